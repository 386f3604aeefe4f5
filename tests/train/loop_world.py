"""The loop around a model of one number, so that its rules can be tested in moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config import defaults
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import replicated
from jaxalign.steps.objective import Objective, Sums
from jaxalign.steps.step import make_train_step
from jaxalign.train.checkpoints import Checkpoints, abstract
from jaxalign.train.compiled import Compiled
from jaxalign.train.health import Health
from jaxalign.train.loop import Loop
from jaxalign.train.metrics import Writer
from jaxalign.train.rundir import RunDir
from jaxalign.types import Batch, Completions, Readouts, Rows, TrainState

LENGTH = 4


def host_batch(index, rows=8, value=None, weight=1.0):
    """Rows whose first token stands for the target number."""
    tokens = np.full((rows, LENGTH), index if value is None else value, np.int32)
    place = np.arange(LENGTH, dtype=np.int32)[None].repeat(rows, 0)
    ones = np.ones((rows, 1), np.int32)
    return Batch(
        Rows(tokens, place, 0 * place, place + 1),
        Readouts(0 * ones, 0 * ones, 0 * ones, ones.astype(bool)),
        Completions(0 * ones, 2 * ones, weight * np.ones((rows, 1), np.float32), np.zeros((rows, 1), np.float32),
                    np.zeros((rows, 1), np.float32), ones.astype(bool)),
        rows * index + np.arange(rows, dtype=np.int32)[:, None],
    )  # fmt: skip


class Data:
    """Batches by index; `changes` maps an index to another batch, or to an exception."""

    def __init__(self, changes=None, batches_per_epoch=100, partial=()):
        self.changes, self.batches_per_epoch, self.asked = changes or {}, batches_per_epoch, []
        self.partial = partial  # indices of batches with rows to spare

    def batch(self, index, process_index=0, process_count=1):
        self.asked.append(index)
        found = self.changes.get(index, host_batch(index))
        if isinstance(found, Exception):
            raise found
        return found

    def is_whole(self, index):
        return index not in self.partial


def squared(params, frozen, extra, statistics, batch):
    """The squared distance of one number to 1; nan where the token is negative."""
    x = params["policy"]["norm"]["scale"][0]
    target = jnp.where(batch.rows.tokens[:, 0] < 0, jnp.nan, 1.0)
    weight = batch.completions.weight[:, 0]
    total = jnp.sum(weight * (x - target) ** 2)
    return Sums({"policy": total}, {"x": (x * jnp.sum(weight), jnp.sum(weight))})


objective = Objective(lambda batch: {"policy": jnp.sum(batch.completions.weight[:, 0])}, squared)


class World:
    """A loop in a directory; `run()` goes on from what is there."""

    def __init__(
        self, workdir, *, num_steps=6, rate=0.1, data=None, prepare=None, evaluate=None, offload=False, **fields
    ):
        self.config = defaults("dpo")
        self.config.workdir = str(workdir)
        self.config.logging.trackers = ()
        self.config.logging.progress = False
        for name, value in fields.items():
            section, leaf = name.split("__")
            self.config[section][leaf] = value
        self.mesh = make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
        self.data, self.num_steps = data or Data(), num_steps
        self.prepare = prepare or (lambda state, frozen, batch: (state, [batch], {}))
        self.evaluate, self.offload = evaluate, offload
        self.directory = RunDir(str(workdir))
        self.tx = optax.chain(optax.sgd(rate), optax.scale_by_schedule(lambda _: 1.0))
        whole = self.places = replicated(self.mesh)
        self.like = abstract(jax.eval_shape(self.fresh), jax.tree.map(lambda _: whole, jax.eval_shape(self.fresh)))
        self.step = Compiled(
            make_train_step(objective, {"policy": self.tx}), "train step", donate=(0,), out_shardings=whole
        )

    def fresh(self):
        params = {"policy": {"norm": {"scale": jnp.zeros(1)}}}
        opt = {"policy": self.tx.init(params["policy"])}
        return TrainState(jnp.int32(0), params, opt, {}, jnp.int32(0))

    def run(self):
        c = self.config
        checkpoints = Checkpoints(
            self.directory.checkpoints,
            keep=c.checkpoint.keep,
            best_metric=c.checkpoint.best_metric,
            best_mode=c.checkpoint.best_mode,
        )
        found = checkpoints.resume(self.like, whole=c.checkpoint.resume == "whole")
        start, state, _ = found or (0, jax.jit(self.fresh, out_shardings=self.places)(), {})
        writer = Writer(self.directory, c.logging, start=start, config={})
        loop = Loop(
            name="test",
            config=c,
            mesh=self.mesh,
            frozen={},
            step=self.step,
            prepare=self.prepare,
            dataset=self.data,
            num_steps=self.num_steps,
            checkpoints=checkpoints,
            writer=writer,
            directory=self.directory,
            health=Health(),
            evaluate=self.evaluate,
            offload=self.offload,
        )
        try:
            with jax.set_mesh(self.mesh):
                return loop.run(state, start)
        finally:
            writer.close()
            checkpoints.close()

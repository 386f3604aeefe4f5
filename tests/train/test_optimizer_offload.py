"""The optimizer's state in host memory but for updates: the same numbers, places, checkpoints and one compile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from loop_world import World, objective, squared

from jaxalign.parallel.host_memory import DEVICE, HOST
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, replicated
from jaxalign.steps.step import make_train_step
from jaxalign.train.checkpoints import Checkpoints, abstract
from jaxalign.train.compiled import Compiled
from jaxalign.types import TrainState

SIZE = 256  # of a square matrix: large enough that a checkpoint is still being written when the next update comes


def distance(params, frozen, extra, statistics, batch):
    """The distance of a matrix, every number of which has a gradient of its own."""
    x = params["policy"]["embed"]["embedding"]
    mean = {"policy": {"norm": {"scale": jnp.sum(x, keepdims=True)[0] / SIZE**2}}}
    sums, weight = squared(mean, frozen, extra, statistics, batch), objective.weights(batch)["policy"]
    return sums._replace(terms={"policy": sums.terms["policy"] + weight * jnp.sum(jnp.sin(x) ** 2)})


of_matrix = objective._replace(terms=distance)


class Matrix(World):
    """The loop around a matrix split both ways, under AdamW; every batch gives two updates."""

    def __init__(self, workdir, **options):
        self.seen = {"prepare": [], "evaluate": [], "updated": [], "kept": []}
        super().__init__(workdir, prepare=self.two, evaluate=self.look, eval__every=2, checkpoint__every=1,
                         checkpoint__keep=9, **options)  # fmt: skip
        self.mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
        self.tx = optax.chain(optax.adamw(0.01), optax.scale_by_schedule(lambda _: 1.0))
        like = jax.eval_shape(self.fresh)
        whole = replicated(self.mesh)
        opt, params = param_shardings(self.mesh, like.opt), param_shardings(self.mesh, like.params)
        self.places = TrainState(whole, params, opt, {}, whole)
        self.like = abstract(like, self.places)
        self.compiled = Compiled(
            make_train_step(of_matrix, {"policy": self.tx}),
            "train step",
            donate=(0,),
            out_shardings=(self.places, whole),
        )
        self.step = self

    num_compiles = property(lambda self: self.compiled.num_compiles)
    compile_seconds = property(lambda self: self.compiled.compile_seconds)

    def __call__(self, state, frozen, batch):
        new, metrics = self.compiled(state, frozen, batch)
        self.note("updated", new)
        return new, metrics

    def two(self, state, frozen, batch):
        self.note("prepare", state)
        return state, [batch, batch], {}

    def look(self, state):
        self.note("evaluate", state)
        return {"x": 0.0}

    def note(self, name, state):
        leaves = jax.tree.leaves(state.opt)
        self.seen[name].append({x.sharding.memory_kind for x in leaves})
        self.seen["kept"].append(leaves)

    def fresh(self):
        values = jnp.linspace(-1, 1, SIZE**2).reshape(SIZE, SIZE)
        params = {"policy": {"embed": {"embedding": values}}}
        return TrainState(jnp.int32(0), params, {"policy": self.tx.init(params["policy"])}, {}, jnp.int32(0))


def checkpoints_of(world):
    there = Checkpoints(world.directory.checkpoints, keep=9)
    found = {step: jax.device_get(there.restore(step, world.like)[0]) for step in there.steps()}
    there.close()
    return found


def test_states_wait_on_the_host_and_nothing_else_changes(tmp_path):
    plain = Matrix(tmp_path / "plain", num_steps=5)
    wanted, _ = plain.run()
    there = Matrix(tmp_path / "there", num_steps=3, offload=True)
    first, _ = there.run()
    there.num_steps = 5
    state, _ = there.run()  # on from a checkpoint
    assert there.num_compiles == plain.num_compiles == 1
    assert there.seen["prepare"] == [{HOST}] * 5 and there.seen["evaluate"] == [{HOST}] * 4
    assert there.seen["updated"] == [{DEVICE}] * 10 and plain.seen["prepare"] == [{DEVICE}] * 5
    last = {id(x) for x in jax.tree.leaves((first.opt, state.opt))}
    assert all(x.is_deleted() or id(x) in last for leaves in there.seen["kept"] for x in leaves), "a second copy stays"
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    for x, place in zip(jax.tree.leaves(state.opt), jax.tree.leaves(there.places.opt), strict=True):
        assert x.sharding.spec == place.spec and x.sharding.mesh == place.mesh
    assert any(x.addressable_shards[0].data.shape == (SIZE // 2, SIZE // 4) for x in jax.tree.leaves(state.opt))
    saved, due = checkpoints_of(there), checkpoints_of(plain)
    assert sorted(saved) == sorted(due) == [1, 2, 3, 4, 5]
    for step in due:
        jax.tree.map(np.testing.assert_array_equal, saved[step], due[step])


def test_a_run_goes_on_with_and_without(tmp_path):
    plain, other = Matrix(tmp_path / "plain", num_steps=4), Matrix(tmp_path / "other", num_steps=2, offload=True)
    wanted, _ = plain.run()
    other.run()
    other.num_steps, other.offload = 4, False
    state, _ = other.run()
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt)} == {DEVICE}
    jax.tree.map(np.testing.assert_array_equal, state, wanted)

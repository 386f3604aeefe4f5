"""jaxalign's own training stage on a config and data files; turns take the place of its evaluations."""

import json
import os

from turns import Turns, text

turns = Turns()

import jax  # noqa: E402

turns.count_compilation()

from jaxalign import config as configuration  # noqa: E402
from jaxalign.config import defaults  # noqa: E402
from jaxalign.parallel.mesh import make_mesh  # noqa: E402
from jaxalign.parallel.startup import start  # noqa: E402
from jaxalign.train import trainer  # noqa: E402
from jaxalign.train.metrics import count_tokens  # noqa: E402
from jaxalign.train.rundir import RunDir  # noqa: E402
from jaxalign.train.stage import Stage  # noqa: E402

turns.imported("jaxalign", "jax", "jaxlib", "flax", "optax")
case = turns.case


def write_data() -> str:
    """The records as a file of text, without the BOS and EOS that the data layer adds of its own accord."""
    path = os.path.join(turns.scratch, "data.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for record in turns.records():
            if case["task"] == "sft":
                row = {"text": text(record["ids"][1:-1])}
            elif case["task"] == "ppo":
                row = {"prompt": text(record["ids"])}
            else:
                row = {"prompt": text(record["prompt"]) + " "}
                row |= {side: text(record[side][:-1]) for side in ("chosen", "rejected")}
            print(json.dumps(row), file=file)
    return path


def write_reward_model() -> str:
    """A reward model of the policy's shape, with random weights."""
    from jaxalign.models import hf

    path, source = os.path.join(turns.scratch, "reward"), f"{turns.directory}/model"
    options = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "head": "score"}
    hf.save(path, *hf.from_scratch(source, key=jax.random.key(1), **options), source=source)
    return path


def make_config():
    """Defaults, but for what the peers are given too: shapes, float32 without recomputation, AdamW at 1e-4."""
    task = case["task"]
    c = defaults(task)
    c.workdir = os.path.join(turns.scratch, "run")
    c.model.path = f"{turns.directory}/model"
    c.model.from_scratch = True
    c.model.remat = "none"
    c.data.sources = (write_data(),)
    c.data.max_length = case["length"]
    c.batch_size = case["batch"]
    c.num_train_steps = 10**6  # until the rounds are over
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "constant"
    c.logging.trackers = ()
    c.logging.progress = False
    c.eval.every = 1
    if task == "sft":
        c.data.packing = case["ragged"]
        c.data.row_length = case["length"]
    if case["rank"] and not turns.options.get("full"):
        c.adapter.rank = case["rank"]
        c.adapter.alpha = 2.0 * case["rank"]
    if task == "dpo":
        c.algorithm.reference = case["reference"]
    if task in ("dpo", "ppo"):
        c.logging.samples_every = 0
    if task == "ppo":
        c.optimizer.value_learning_rate = 1e-4
        c.rewards.model = write_reward_model()
        c.rollout.max_new_tokens = case["length"] - case["prompt"]
        c.algorithm.num_ppo_epochs = case["epochs"]
        c.algorithm.num_minibatches = case["minibatches"]
    configuration.validate(c)
    return c


def check(dataset) -> None:
    """Stops where the data layer has made more or fewer tokens than the case has."""
    if case["ragged"] or case["task"] == "ppo":
        return
    length, prompt = case["length"], case["prompt"]
    due = case["batch"] * (length if case["task"] == "sft" else 2 * length - prompt)
    found = count_tokens(dataset.batch(0).rows)
    assert found == due, f"{found} tokens in a batch where {due} are due"


def main() -> None:
    config = make_config()
    start()
    mesh = make_mesh(config.mesh)
    directory = RunDir(config.workdir)
    directory.open(configuration.to_dict(config), resume=False)
    with jax.set_mesh(mesh):
        stage = Stage(config, mesh, directory)
        check(stage.dataset)
        counted = [0, 0]  # batches, their real tokens

        def tokens(step: int) -> float:
            for index in range(counted[0], step):
                counted[1] += count_tokens(stage.dataset.batch(index).rows)
            counted[0] = step
            return counted[1]

        def turn(state) -> dict:
            """In place of an evaluation: the loop has read all metrics of the steps so far."""
            jax.block_until_ready(state)
            step = int(state.data_cursor)
            turns.after_step(step, (lambda: tokens(step)) if case["ragged"] else None)
            config.eval.every = turns.steps
            return {}

        trainer._evaluate = lambda stage, frozen, dataset: turn
        trainer._train(stage)


main()

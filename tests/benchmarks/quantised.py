"""Frozen kernels in 8 or 4 bits against 16: what logits and a trained adapter lose, and what steps and tokens cost.

    python tests/benchmarks/quantised.py                       two pretrained models and a wider one; about ten minutes
    python tests/benchmarks/quantised.py --models stories3m-llama --steps 100
    python tests/benchmarks/quantised.py --smoke               toy size, a few steps

Each model is trained by SFT with an adapter of rank 16 on TinyStories, once for each `model.frozen_dtype`, all of them
taking turns in one process; then each completes prompts. Errors of logits are shares of the standard deviation of the
logits of the base in bfloat16, of held-out stories, before training; the loss is of held-out stories, before training
and after it. The computation is in float32. The wider model has random weights: its times alone mean something.

Models and stories are those of `$JAXALIGN_SHARED` (default: ../shared); without them one made from a seed stands in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from harness.in_turns import against, in_turns, median

from jaxalign import config as configuration
from jaxalign.config import defaults
from jaxalign.examples.assets import write_assets
from jaxalign.ops.trees import join
from jaxalign.parallel import startup
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import put_batch
from jaxalign.rollout.engine import Generator
from jaxalign.rollout.sampling import Sampling
from jaxalign.train.loop import make_evaluate
from jaxalign.train.rundir import RunDir
from jaxalign.train.stage import Stage

SHARED = Path(os.environ.get("JAXALIGN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
KINDS = ("bfloat16", "int8", "nf4")
WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 8, "head_dim": 64}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="stories260k-llama,stories3m-llama,wide", help="shared ones, and wide")
    parser.add_argument("--steps", type=int, default=200, help="of training (default 200); of the wide model a tenth")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=128, help="tokens of each completion")
    parser.add_argument("--rounds", type=int, default=5, help="of completions")
    parser.add_argument("--remat", default="full", help="what steps recompute, model.remat (default full)")
    parser.add_argument("--smoke", action="store_true", help="toy size, a few steps")
    args = parser.parse_args()
    if args.smoke:
        args.models, args.steps, args.rows, args.length, args.new, args.rounds = "stories260k-llama", 4, 2, 64, 4, 1
    return args


def prepared(name: str, place: Path) -> tuple[Path, Path, bool]:
    """A model's directory, its data, and whether its weights are drawn."""
    stories = SHARED / "data" / "tinystories-sample" / "stories.jsonl"
    if not (SHARED / "models").is_dir():
        world = write_assets(place / "world")
        source, data = world / "model", world / "demonstrations.jsonl"
    elif name != "wide":
        return SHARED / "models" / name, stories, False
    else:
        source, data = SHARED / "models" / "stories3m-llama", stories
    directory = place / name
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    wide = WIDE if name == "wide" else {}
    (directory / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | wide))
    return directory, data, True


class Run:
    """A stage with a base of some kind, as training makes it."""

    def __init__(self, args: argparse.Namespace, model: tuple[Path, Path, bool], kind: str, steps: int, place: Path):
        c = defaults("sft", adapter=16)
        c.workdir = str(place / kind)
        c.model.path, c.model.from_scratch, c.data.sources = str(model[0]), model[2], (str(model[1]),)
        c.model.frozen_dtype, c.model.remat = kind, args.remat
        c.data.max_length = c.data.row_length = args.length
        c.data.truncation, c.data.packing, c.data.eval_fraction = "keep_start", True, 0.1
        c.data.cache_dir = str(place / "cache")
        c.data.max_records = 40 if args.smoke else 1000
        c.batch_size, c.num_train_steps, c.optimizer.learning_rate = args.rows, steps, 1e-3
        configuration.validate(c)
        self.mesh = make_mesh(c.mesh, jax.devices()[:1])
        directory = RunDir(c.workdir)
        directory.open(configuration.to_dict(c), resume=False)
        self.stage = Stage(c, self.mesh, directory)
        self.state, self.frozen, self.done, self.losses = self.stage.start(), self.stage.frozen(), 0, []
        self.base_bytes = sum(x.nbytes for x in jax.tree.leaves(self.frozen["policy"]["layers"]))

    def train(self, steps: int) -> None:
        """So many steps more."""
        for _ in range(steps):
            batch = put_batch(self.stage.dataset.batch(self.done), self.mesh)
            self.state, metrics = self.stage.step(self.state, self.frozen, batch)
            self.done += 1
        self.losses.append(float(jax.block_until_ready(metrics)["loss"]))
        jax.block_until_ready(self.state)

    @property
    def model(self):
        return self.stage.program.trained["policy"].model

    @property
    def params(self) -> Any:
        return join(self.state.params["policy"], self.frozen["policy"])

    def logits(self) -> np.ndarray:
        """Of some held-out rows."""
        rows = jax.tree.map(jnp.asarray, self.stage.eval_dataset.batch(0).rows)
        read = jax.jit(lambda params: self.model.apply(params, rows)[0] @ self.model.head(params))
        return np.asarray(read(self.params))

    def loss(self) -> float:
        """Of all held-out rows."""
        held_out = self.stage.eval_dataset
        step = lambda state, frozen, batch: self.stage.eval_step(state.params, frozen, state.extra, batch)  # noqa: E731
        evaluate = make_evaluate(step, self.frozen, held_out, held_out.batches_per_epoch, self.mesh)
        return evaluate(self.state)["loss"]

    def generator(self, new: int) -> Generator:
        """That continues prompts greedily, all to the same length."""
        options = {"stop_ids": (), "sampling": Sampling(0.0, new), "batch_size": 16}
        return Generator(self.model, self.params, self.stage.tokenizer, **options)


def measure(name: str, args: argparse.Namespace, place: Path) -> None:
    """Prints a line for each kind of base."""
    model = prepared(name, place)
    steps = args.steps if name != "wide" else max(args.steps // 10, 2)
    a_turn = max(steps // 20, 1)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        kinds = KINDS[::2] if args.smoke else KINDS
        runs = {kind: Run(args, model, kind, steps, place / f"{name}-runs") for kind in kinds}
        first = {kind: run.logits() for kind, run in runs.items()}
        exact = first["bfloat16"]
        before = {kind: run.loss() for kind, run in runs.items()}
        turns = {kind: lambda run=run: run.train(a_turn) for kind, run in runs.items()}
        trained = in_turns(turns, steps // a_turn - 1)
        losses = {kind: run.loss() for kind, run in runs.items()}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, runs["nf4"].model.config.vocab_size, 32) for _ in range(16)]
    makers = {kind: run.generator(args.new) for kind, run in runs.items()}
    made = in_turns({kind: lambda g=g: g.continue_ids(prompts, seed=0) for kind, g in makers.items()}, args.rounds)
    config = runs["nf4"].model.config
    print(
        f"{name}: hidden {config.embed_dim}, {config.num_layers} layers; {runs['nf4'].done} steps of "
        f"{args.rows} x {args.length} tokens"
    )
    for kind, run in runs.items():
        error = np.sqrt(np.mean((first[kind] - exact) ** 2)) / exact.std()
        share = run.base_bytes / runs["bfloat16"].base_bytes
        step = median(trained[kind]).wall / a_turn
        tokens = args.rows * args.length / step, len(prompts) * args.new / median(made[kind]).wall
        quality = f"logits {error:6.2%} off, held-out loss {before[kind]:.4f} -> {losses[kind]:.4f}, "
        print(
            f"  {kind:8} layers' bytes {share:.2f}x, {'' if model[2] else quality}"
            f"training {tokens[0]:,.0f} tokens/s, time {against(trained[kind], trained['bfloat16'])}, "
            f"decoding {tokens[1]:,.0f} tokens/s, time {against(made[kind], made['bfloat16'])}",
            flush=True,
        )


def main() -> int:
    """Goes through the models."""
    args = parse()
    startup.start()  # as a run begins
    with tempfile.TemporaryDirectory() as place:
        for name in args.models.split(","):
            measure(name, args, Path(place) / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

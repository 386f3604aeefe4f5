"""The SFT step of a model that a `config.json` describes, on random weights and a batch of random words."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from gpu_parts.batches import texts

from jaxalign.config import defaults
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.steps.sft import sft_objective
from jaxalign.steps.step import make_train_step
from jaxalign.train.compiled import Compiled
from jaxalign.train.optimizer import make_optimizer
from jaxalign.types import TrainState


class SftStep:
    """One in float32; a call makes it and waits for it.

    Attributes:
      config: the model's.
      program: what it was compiled to.
      state: of training.
    """

    def __init__(self, described: dict[str, Any], rows: int, length: int):
        self.config = from_hf(described, dtype="float32", param_dtype="float32", remat="none")
        model = self._model = Model(self.config)
        tx = make_optimizer(defaults("sft").optimizer, 1e-4, 1000)
        self._step = make_train_step(sft_objective(model.apply, model.head), {"policy": tx})
        self._batch = jax.tree.map(jnp.asarray, texts(self.config.vocab_size, rows=rows, length=length))

        def begun(params) -> TrainState:
            return TrainState(jnp.int32(0), {"policy": params}, {"policy": tx.init(params)}, {}, jnp.int32(0))

        self._begun = begun

    def lowered(self) -> str:
        """What the step is before it is compiled."""
        params = jax.eval_shape(self._model.init, jax.random.key(0))
        return jax.jit(self._step).lower(jax.eval_shape(self._begun, params), {}, self._batch).as_text()

    def compile(self) -> SftStep:
        """Itself, ready to be called."""
        self._compiled = Compiled(self._step, "step", donate=(0,))
        self.state = jax.jit(self._begun)(jax.jit(self._model.init)(jax.random.key(0)))
        self.program = self._compiled.compile(self.state, {}, self._batch).as_text()
        return self

    def __call__(self) -> None:
        self.state = jax.block_until_ready(self._compiled(self.state, {}, self._batch)[0])


def add_sizes(parser: argparse.ArgumentParser, *, layers: int, rows: int, rounds: int) -> None:
    """Flags of a model's and a batch's sizes, with these of a script's own as defaults."""
    for name, value in {"hidden": 512, "layers": layers, "heads": 8, "ffn": 1376, "vocab": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"rows": rows, "length": 256, "rounds": rounds}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--smoke", action="store_true", help="toy size, one round")


def sized(args: argparse.Namespace, length: int) -> argparse.Namespace:
    """The same flags, with `--smoke` those of a toy whose rows have a length."""
    if args.smoke:
        args.hidden, args.layers, args.heads, args.ffn, args.vocab = 32, 2, 2, 64, 128
        args.rows, args.length, args.rounds = 2, length, 1
    return args


def described(model_type: str, args: argparse.Namespace) -> dict[str, Any]:
    """A `config.json` of these sizes, without what a family has of its own."""
    return {
        "model_type": model_type,
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "head_dim": args.hidden // args.heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }

"""Low-rank adapters: which linears of which layers have one, fresh ones, and the model that has them merged in.

Parameters of an adapter lie beside the kernel that they update: `layers/attention/query/lora_a`, `lora_b` and, with
DoRA, `magnitude`, stacked like all layers.  A tree without them is the base model, and the same `Model` computes it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import zlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import InputError
from jaxalign.models.quantised import kernel_of
from jaxalign.ops.low_rank import LowRank, column_norms, merged
from jaxalign.ops.precision import at_least_float32
from jaxalign.ops.trees import split
from jaxalign.types import Params

LEAVES = ("lora_a", "lora_b", "magnitude")
ALL_LINEAR = "all-linear"


class Update(NamedTuple):
    """The adapter of one linear, by layer."""

    ranks: tuple[int, ...]  # 0: that layer has none
    scales: tuple[float, ...]  # of `a b`

    @property
    def rank(self) -> int:
        """Of the stacked arrays: a layer of a smaller rank has zeros, which stay so."""
        return max(self.ranks)

    @property
    def scale(self) -> float | None:
        """Of all layers; None where they differ."""
        return self.scales[0] if len(set(self.scales)) == 1 else None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of a model; hashable, as its config is."""

    updates: tuple[tuple[str, Update], ...]  # by path in a layer: "attention/query"
    dora: bool = False
    rslora: bool = False  # scales are alpha / sqrt(rank), which an export says

    def update(self, path: str) -> Update | None:
        """That of the linear at a path in a layer."""
        return dict(self.updates).get(path)

    def numbers(self, dtype: Any) -> dict[str, np.ndarray]:
        """What differs from layer to layer, as what a layer receives: [L] by path, scales and which have magnitudes.

        Args:
          dtype: of the computation; scales are in at least float32.
        """
        wide = jnp.promote_types(dtype, jnp.float32)
        scales = {_number(path): np.array(u.scales, wide) for path, u in self.updates if u.scale is None}
        return scales | {_there(path): np.array(u.ranks) > 0 for path, u in self.updates if self.dora and 0 in u.ranks}

    def scaled(self, layer: Params, numbers: Mapping[str, Any], length: int, dtype: Any) -> Params:
        """One layer's parameters, scales of its own multiplied into `lora_b`.

        In a layer without an update magnitudes are what changes nothing, whatever the stacked array has there.

        Args:
          layer: its parameters.
          numbers: its own.
          length: of the embed dim, D.
          dtype: of the computation, in which kernels have the norms.
        """
        for path, update in self.updates:
            own = _at(layer, path)
            if update.scale is None:
                own = own | {"lora_b": own["lora_b"] * numbers[_number(path)]}
            if self.dora and 0 in update.ranks:
                kernel = kernel_of(own, path, length, dtype).astype(dtype)
                norms = jax.lax.stop_gradient(column_norms(kernel, own["lora_a"], own["lora_b"]))
                own = own | {"magnitude": jnp.where(numbers[_there(path)], own["magnitude"], norms)}
            layer = _put(layer, path, own)
        return layer

    def merged(self, layers: Params, some: Callable[[Any], Any] = lambda x: x, dtype: Any = None) -> Params:
        """Stacked layers with the adapter multiplied into their kernels, in at least float32; the base model's.

        Args:
          layers: [N, ...], all or some; without parameters of an adapter they stay as they are.
          some: from what all layers have, [L], to those that are given.
          dtype: of the merged kernels; None: as they were.
        """

        def one(kernel, a, b, magnitude, scale, there):
            whole = merged(kernel, LowRank(a, at_least_float32(b) * scale, magnitude)).astype(dtype or kernel.dtype)
            return whole if there is None else jnp.where(there, whole, kernel.astype(whole.dtype))

        for path, update in self.updates:
            own = _at(layers, path)
            if "lora_a" in own:
                scales = some(jnp.asarray(update.scales, at_least_float32(own["lora_b"]).dtype))
                there = some(jnp.asarray(update.ranks) > 0) if 0 in update.ranks else None
                parts = (own["kernel"], own["lora_a"], own["lora_b"], own.get("magnitude"), scales, there)
                whole = {name: x for name, x in own.items() if name not in LEAVES} | {"kernel": jax.vmap(one)(*parts)}
                layers = _put(layers, path, whole)
        return layers

    def without_still(self, params: Params) -> Params:
        """Trained parameters, zeros where nothing reads them: magnitudes of layers that have no update.

        Args:
          params: those that are trained, an adapter's or more.
        """
        for path, update in self.updates:
            if self.dora and 0 in update.ranks:
                own = _at(params["layers"], path)
                there = np.array(update.ranks).reshape(-1, *(1,) * (own["magnitude"].ndim - 1)) > 0
                still = own | {"magnitude": jnp.where(there, own["magnitude"], 0)}
                params = params | {"layers": _put(params["layers"], path, still)}
        return params


def _number(path: str) -> str:
    return f"scale of {path}"


def _there(path: str) -> str:
    return f"update of {path}"


class Rules(NamedTuple):
    """What a configuration says of an adapter, or PEFT's `adapter_config.json`."""

    rank: int
    alpha: float  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = (ALL_LINEAR,)  # patterns of names, see `make`
    rank_pattern: tuple[tuple[str, int], ...] = ()  # the first that matches takes the place of `rank`
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead (arXiv 2312.03732 eq. 6)
    dora: bool = False


def make(config: Any, rules: Rules) -> Adapter:
    """The adapter of a model by rules.

    A pattern is a regular expression of the end of a linear's name, after a dot or a slash: of Hugging Face's,
    "model.layers.3.self_attn.q_proj", or ours, "layers/attention/query".

    Args:
      config: a ModelConfig.
      rules: of the adapter.

    Raises:
      InputError: a pattern that matches nothing, with the nearest names, or that is no regular expression.
    """
    names = _linears(config)
    everything = rules.targets == (ALL_LINEAR,)
    found: dict[str, re.Pattern] = {}
    for field in ("targets", "rank_pattern", "alpha_pattern"):
        for given in () if everything and field == "targets" else getattr(rules, field):
            pattern = given if field == "targets" else given[0]
            found[pattern] = _expression(rules, field, pattern)
            if not any(found[pattern].search(name) for layers in names.values() for both in layers for name in both):
                ends = sorted({name.split(".")[-1] for layers in names.values() for name, _ in layers} | names.keys())
                whole = [name for layers in names.values() for name, _ in layers]
                near = get_close_matches(pattern, [*ends, *whole], n=1, cutoff=0.0)[0]
                or_all = f", or {ALL_LINEAR}" if field == "targets" else ""
                raise InputError(
                    f"the adapter's pattern {pattern!r} matches no linear of a layer (adapter.{field})",
                    f"one of {', '.join(ends)}, with or without what stands before it{or_all}",
                    f"--config.adapter.{field}={_with_pattern(rules, field, pattern, near)}",
                )

    def matches(pattern: str, both: tuple[str, str]) -> bool:
        return any(found[pattern].search(name) for name in both)

    def first(pairs: tuple[tuple[str, Any], ...], both: tuple[str, str], usual: Any) -> Any:
        return next((value for pattern, value in pairs if matches(pattern, both)), usual)

    updates = []
    for path, layers in names.items():
        ranks, scales = [], []
        for both in layers:
            targeted = everything or any(matches(t, both) for t in rules.targets)
            rank = first(rules.rank_pattern, both, rules.rank) if targeted else 0
            alpha = first(rules.alpha_pattern, both, rules.alpha)
            ranks.append(rank)
            scales.append(float(alpha) / (rank**0.5 if rules.rslora else rank) if rank else 0.0)
        if any(ranks):
            usual = next(scale for rank, scale in zip(ranks, scales, strict=True) if rank)
            # A layer without an adapter has zeros: any scale is its own.
            own = tuple(scale if rank else usual for rank, scale in zip(ranks, scales, strict=True))
            updates.append((path, Update(tuple(ranks), own)))
    return Adapter(tuple(updates), rules.dora, rules.rslora)


def _with_pattern(rules: Rules, field: str, pattern: str, right: str) -> str:
    """A field of the rules with another pattern in the place of one, as a flag gives it."""
    given = getattr(rules, field)
    if field == "targets":
        mended: tuple = tuple(right if target == pattern else target for target in given)
    else:
        mended = tuple((right if key == pattern else key, number) for key, number in given)
    return shlex.quote(json.dumps(mended))


def _expression(rules: Rules, field: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(rf"(?:^|[./])(?:{pattern})$")
    except re.error as error:
        raise InputError(
            f"the adapter's pattern {pattern!r}: {error}",
            "a regular expression of a linear's name",
            f"--config.adapter.{field}={_with_pattern(rules, field, pattern, re.escape(pattern))}",
        ) from error


def _linears(config: Any) -> dict[str, list[tuple[str, str]]]:
    """The linears of a layer by their path in it, with Hugging Face's name and ours, of each layer."""
    found = {}
    for row in config.family.names.rows:
        if row.path.startswith("layers/") and row.path.endswith("/kernel"):
            path = row.path.removesuffix("/kernel")
            theirs = [row.named((i,)).removesuffix(".weight") for i in range(config.num_layers)]
            found[path.removeprefix("layers/")] = [(name, path) for name in theirs]
    return found


def is_adapter(path: str) -> bool:
    """Whether the parameter at a path is an adapter's."""
    return path.rpartition("/")[2] in LEAVES


def base(params: Params) -> Params:
    """The parameters without an adapter's: the base model's."""
    return split(params, lambda path: not is_adapter(path))[0]


def has_adapter(tree: Params) -> bool:
    """Whether a tree of parameters holds an adapter's."""
    return any(has_adapter(own) if isinstance(own, dict) else name in LEAVES for name, own in tree.items())


def fresh(adapter: Adapter, abstract: Params, key: jax.Array, kernels: Params) -> Params:
    """An adapter that changes nothing yet: `a` uniform in [-1, 1] / sqrt(inputs), `b` zeros, as PEFT starts them.

    A function of key, path and shape alone: the same on every mesh, and whatever else has an adapter.

    Args:
      adapter: of the model.
      abstract: shapes and dtypes of the adapter's parameters.
      key: a jax random key.
      kernels: layers of the base, for DoRA's magnitudes; else not read.
    """

    def one(path: str, own: Params, update: Update) -> Params:
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        shape = own["lora_a"].shape
        bound = float(np.prod(shape[1:-1])) ** -0.5
        a = jax.random.uniform(own_key, shape, own["lora_a"].dtype, -bound, bound)
        there = np.arange(shape[-1]) < np.array(update.ranks)[:, None]
        found = {
            "lora_a": jnp.where(there.reshape(shape[0], *(1,) * (len(shape) - 2), shape[-1]), a, 0),
            "lora_b": jnp.zeros(own["lora_b"].shape, own["lora_b"].dtype),
        }
        if "magnitude" in own:
            length = abstract["embed"]["embedding"].shape[1]
            norms = lambda own, a, b: column_norms(kernel_of(own, path, length), a, b)  # noqa: E731
            each = (_at(kernels, path), *found.values())
            found["magnitude"] = jax.lax.map(lambda x: norms(*x), each).astype(own["magnitude"].dtype)
        return found

    made: Params = {}
    for path, update in adapter.updates:
        made = _put(made, path, one(path, _at(abstract["layers"], path), update))
    return {"layers": made}


def _at(tree: Params, path: str) -> Params:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _put(tree: Params, path: str, value: Params) -> Params:
    """The same tree with another part at a path."""
    name, _, rest = path.partition("/")
    return tree | {name: _put(tree.get(name, {}), rest, value) if rest else value}

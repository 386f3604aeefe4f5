"""Where the values of a role's parameters come from: a checkpoint, an adapter and its base, or random numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxalign.errors import InputError
from jaxalign.models import adapter as adapters
from jaxalign.models import hf, peft
from jaxalign.models.adapter import Adapter, Rules, is_adapter
from jaxalign.models.added_tokens import Added
from jaxalign.models.config import ModelConfig, read_config
from jaxalign.models.hub import ADAPTER_CONFIG, base_of, is_adapter_dir, locate, read_json
from jaxalign.models.token_rows import ENDS, TokenRows
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import by_path, from_paths, join, split
from jaxalign.parallel.sharding import param_shardings
from jaxalign.train.trained import cuts_of
from jaxalign.types import Params

Wanted = Callable[[str], bool]


class Start(NamedTuple):
    """A model and its start values."""

    model: Model
    read: Callable[[Wanted], Params]  # those at some paths; another call gives another copy
    origin: Callable[[str], Hashable]  # of the value at a path: the same for another role is the same value
    check: Callable[[], None]  # refuses a checkpoint that `read` cannot take; headers alone are read
    base: tuple[str, str | None] | None  # the whole model: a directory or a hub id, its revision; None: made at random
    learned: Wanted  # what the adapter that it starts from has of its own beside updates of kernels: a head


def start_of(
    path: str,
    revision: str | None,
    mesh: Mesh,
    *,
    key: jax.Array,
    scratch: bool,
    new_head: bool,
    rules: Rules | None,
    attention: str | None,
    quantised: str | None = None,
    added: Added | None = None,
    train: Sequence[str] = (),
    token_rows: TokenRows | None = None,
    **settings: Any,
) -> Start:
    """What a role starts from.

    An adapter in PEFT's form stays beside its base, which roles of other adapters may share.

    Args:
      path: of a checkpoint or an adapter, a directory or a hub id.
      revision: of a hub id.
      mesh: where the values go.
      key: of fresh parameters.
      scratch: whether the model starts from its `config.json` alone.
      new_head: whether a scalar head that the checkpoint lacks is made.
      rules: of an adapter that is made where `path` is none; else they must be that one's.
      attention: the backend.
      quantised: how layers' kernels take few bits: "int8" or "nf4".
      added: tokens that the checkpoint has no vectors of.
      train: patterns of what is trained, by which layers lie in several stacks; not beside an adapter or few bits.
      token_rows: tokens whose vectors are trained and not their tables.
      settings: of `read_config`.

    Raises:
      InputError: a model that cannot be read, or an adapter that is not as the rules say.
    """
    directory = locate(path, revision, weights=False)
    config = read_config(directory, **settings)
    saved = base = None
    if is_adapter_dir(directory):
        directory = locate(path, revision)
        base, saved = base_of(directory, weights=False), peft.read(directory, config)
    config = config.with_added(added)
    adapter = _adapter(path, config, rules, None if saved is None else saved.adapter)
    token_rows = _token_rows(path, token_rows, None if saved is None else saved.token_rows)
    held = frozenset() if saved is None else frozenset(by_path(saved.leaves))
    cuts = cuts_of(config, train) if adapter is None and quantised is None else None
    beside: dict[str, Any] = {"quantised": quantised, "cuts": cuts, "token_rows": token_rows}
    model = Model(dataclasses.replace(config, adapter=adapter, **beside), attention)
    learned = frozenset() if saved is None else _paths_of(config, saved.tensors)
    if quantised and (whole := learned - by_path(model.abstract()).keys()):
        raise InputError(
            f"{path} has {min(whole)} of its own, which model.frozen_dtype={quantised} would quantise",
            "an adapter of updates beside its base's kernels",
            "--config.model.frozen_dtype=bfloat16",
        )
    shardings = lambda tree: param_shardings(mesh, tree)  # noqa: E731

    def read_base(wanted: Wanted) -> Params:
        given = settings | {"shardings": shardings, "wanted": wanted, "added": added} | beside
        if scratch:
            return hf.from_scratch(path, revision=revision, key=key, **given)[1]
        if base is None:
            return hf.load(path, revision=revision, key=key if new_head else None, **given)[1]
        own = given | {"wanted": lambda leaf_path: leaf_path in learned and wanted(leaf_path)}
        rest = given | {"wanted": lambda leaf_path: leaf_path not in learned and wanted(leaf_path)}
        fresh = key if new_head else None
        return join(hf.load(directory, **own)[1], hf.load(base_of(directory), key=fresh, **rest)[1])

    def read(wanted: Wanted) -> Params:
        apart = lambda leaf_path: is_adapter(leaf_path) or leaf_path in held  # noqa: E731
        own = split(model.abstract(), lambda leaf_path: apart(leaf_path) and wanted(leaf_path))[0]
        rest = read_base(lambda leaf_path: not apart(leaf_path) and wanted(leaf_path))
        if not own:
            return rest
        if saved is not None:
            values = by_path(saved.leaves)
            places = by_path(shardings(own))
            placed = {path: _placed(values[path].astype(x.dtype), places[path]) for path, x in by_path(own).items()}
            return join(rest, from_paths(placed))
        kernels = read_base(normed.__contains__) if (normed := model.normed_kernels()) else {}
        make = jax.jit(model.init_adapter, out_shardings=shardings(own))
        return join(rest, make(key, kernels.get("layers", {})))

    def origin(leaf_path: str) -> Hashable:
        more = added if leaf_path in ENDS else None
        if is_adapter(leaf_path) or leaf_path in learned or leaf_path in held:
            return (str(directory), "adapter", settings["param_dtype"], more)
        return (str(base or directory), settings["param_dtype"], scratch, more)

    def check() -> None:
        if not scratch and os.path.isdir(os.path.expanduser(path)):  # a hub's weights come when they are needed
            hf.check(directory, config)

    name, at = path, revision
    if base is not None:
        told = read_json(directory / ADAPTER_CONFIG)
        name, at = told["base_model_name_or_path"], told.get("revision")
    if (local := os.path.expanduser(name)) and os.path.isdir(local):
        name, at = os.path.abspath(local), None
    return Start(model, read, origin, check, None if scratch else (name, at), learned.__contains__)


def _placed(values: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array of all processes, each of which has all of its values."""
    return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])


def _adapter(path: str, config: ModelConfig, rules: Rules | None, saved: Adapter | None) -> Adapter | None:
    """That of the model: the one that is there, or one by rules."""
    if rules is None or saved is None:
        return saved if rules is None else adapters.make(config, rules)
    if not _alike(adapters.make(config, rules), saved):
        ranks = sorted({rank for _, update in saved.updates for rank in update.ranks if rank})
        raise InputError(
            f"{path} is an adapter of rank {', '.join(map(str, ranks))}, and the section `adapter` describes another",
            "that adapter, which is trained on, or a whole model to begin another one beside",
            "--config.adapter.rank=0, which takes it as it is; or jaxalign export --merge, and that model",
        )
    return saved


def _token_rows(path: str, asked: TokenRows | None, saved: TokenRows | None) -> TokenRows | None:
    """Those of the model: that are there, or that are asked for."""
    if None not in (asked, saved) and asked != saved:
        raise InputError(
            f"{path} is an adapter with vectors of some tokens, and model.train names others",
            "these tokens, which are trained on, or a whole model to begin with others",
            "--config.model.train without them; or jaxalign export --merge, and that model",
        )
    return saved if asked is None else asked


def _alike(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are the same; scales are made of a file's alpha and rank, and may differ in the last bit."""
    ranks = [[(path, update.ranks) for path, update in each.updates] for each in (one, other)]
    if (one.dora, one.rslora, ranks[0]) != (other.dora, other.rslora, ranks[1]):
        return False
    found, wanted = ([update.scales for _, update in each.updates] for each in (one, other))
    return np.allclose(found, wanted, rtol=1e-12, atol=0)


def _paths_of(config: ModelConfig, tensors: Any) -> frozenset[str]:
    """The parameters that hold tensors of these Hugging Face names."""
    found = (config.family.names.find(name) for name in tensors)
    return frozenset(row.path for match in found if match for row in match[0].rows)

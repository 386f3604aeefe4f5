"""A model's adapter, and what else was trained beside its frozen parameters, in PEFT's form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import InputError
from jaxalign.models import peft_tokens
from jaxalign.models.adapter import Adapter, is_adapter
from jaxalign.models.gather import on_host
from jaxalign.models.hf_names import Fused, Row, sizes
from jaxalign.models.peft import PARTS, Lies
from jaxalign.models.peft_config import PREFIX
from jaxalign.models.token_rows import table_of
from jaxalign.models.transformer import Model
from jaxalign.models.weights import Planned
from jaxalign.ops.trees import by_path
from jaxalign.types import Params

# PEFT leaves ".weight" out of a magnitude's key and reads both; transformers' own loader knows it with it alone.
_KEYS = PARTS | {"magnitude": f"{PARTS['magnitude']}.weight"}
_TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}


def plan_adapter(
    model: Model, params: Params, *, base: str, revision: str | None = None
) -> tuple[dict[str, Any], dict[str, Planned]]:
    """An adapter's `adapter_config.json`, and its tensors by name; every process of a run calls it.

    Args:
      model: of the parameters, with its adapter.
      params: those that were trained: the adapter's, and others, which are written whole.
      base: the model that they were trained beside, as others find it: a directory or a hub id.
      revision: of a hub id.

    Raises:
      InputError: trained parameters for which PEFT has no form.
    """
    check_form(model, params)
    adapter, leaves = model.config.adapter, by_path(params)
    updates = [
        _update(model, adapter, fused, layer, leaves)
        for layer in range(model.config.num_layers)
        for fused in _linears(model)
        if any(part.rank for part in _parts(adapter, fused, layer))
    ]
    ranks = {one.module: one.rank for one in updates}
    alphas = {one.module: _alpha(one, adapter) for one in updates}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    linears = [_module(fused, layer) for fused in _linears(model) for layer in range(model.config.num_layers)]
    whole = _whole(model, leaves)
    told = {
        "peft_type": "LORA",
        "task_type": _TASKS[model.config.head],
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _by_end({name: own for name, own in ranks.items() if own != rank}, ranks),
        "alpha_pattern": _by_end({name: own for name, own in alphas.items() if own != alpha}, alphas),
        "target_modules": list(_by_end(dict.fromkeys(ranks, True), linears)),
        "modules_to_save": _saved_ends(model, whole) or None,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "fan_in_fan_out": any(_inputs_first(fused) for fused in _linears(model)),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    indices, vectors = peft_tokens.plan(model.config, leaves)
    told |= indices
    if _ties(model, leaves):
        told["ensure_weight_tying"] = True
    tensors = [*(item for one in updates for item in one.tensors.items()), *whole.items(), *vectors.items()]
    return told, {f"{PREFIX}{name}": planned for name, planned in tensors}


def check_form(model: Model, params: Params) -> None:
    """Refuses what PEFT has no form for: before training, from shapes, what would be refused when it is written.

    Args:
      model: of the parameters, with its adapter.
      params: those that are trained; arrays or ShapeDtypeStructs.

    Raises:
      InputError: what is trained, and what could be.
    """
    adapter, leaves = model.config.adapter, by_path(params)
    if adapter is None or not any(map(is_adapter, leaves)):
        raise InputError("no adapter among the parameters", "low-rank updates", "jaxalign.save without base")
    if model.config.score_bias is not None or model.config.num_labels is not None:
        raise _no_form("a head of several labels, or of tokens", "a score: one number, without bias")
    names = model.config.family.names
    for table in filter(None, map(table_of, leaves)):
        if names.has_another(names.row_of(table).name):  # PEFT goes by the modules of one version of transformers
            module = peft_tokens.module_of(model.config, table)
            raise _no_form(f"rows of {module}, which versions of transformers call differently", "it frozen")
    updated = set()
    for layer in range(model.config.num_layers):
        for fused in _linears(model):
            if ranks := [part.rank for part in _parts(adapter, fused, layer) if part.rank]:
                updated.add(_module(fused, layer))
                if adapter.dora and len(ranks) < len(fused.rows):
                    module = _module(fused, layer)
                    raise _no_form(f"some parts of {module} have magnitudes and some have none", "all parts or none")
    if both := updated & {name.rpartition(".")[0] for name in _whole(model, leaves)}:
        raise _no_form(f"{min(both)} is trained whole, and beside it an update of it", "one of the two")


def _no_form(found: str, expected: str) -> InputError:
    fix = "--config.model.train and --config.adapter.targets; in Python, jaxalign.save without base merges the adapter"
    return InputError(f"PEFT has no form for this: {found}", expected, fix)


class _Update(NamedTuple):
    """The update of one module, as it is written."""

    module: str
    rank: int
    scale: float
    tensors: dict[str, Planned]


class _Part(NamedTuple):
    """A kernel's part in the update of a module, mostly all of it."""

    row: Row
    rank: int  # 0: none
    scale: float


def _parts(adapter: Adapter, fused: Fused, layer: int) -> list[_Part]:
    found = []
    for row in fused.rows:
        update = adapter.update(row.path.removeprefix("layers/").removesuffix("/kernel"))
        rank, scale = (0, 0.0) if update is None else (update.ranks[layer], update.scales[layer])
        found.append(_Part(row, rank, scale))
    return found


def _update(model: Model, adapter: Adapter, fused: Fused, layer: int, leaves: Mapping[str, Any]) -> _Update:
    """That of one module of a layer; of a fused one the A of its parts lie one behind the other, their B in blocks."""
    module, dims = _module(fused, layer), sizes(model.config)
    parts = _parts(adapter, fused, layer)
    there = [part for part in parts if part.rank]

    def own(name: str, part: _Part) -> np.ndarray:
        array = on_host(leaves[f"{part.row.path.removesuffix('/kernel')}/{name}"], (layer,))
        array = {"lora_a": array[..., : part.rank], "lora_b": array[: part.rank]}.get(name, array)
        return getattr(Lies.of(part.row), name).to_theirs(array, dims | {"R": part.rank})

    # What was read from one module and not trained since has one A. Of parts whose B are zero one A does too: behind
    # each other they would be read as three times the rank, and no column would say whose it is.
    shared = len(parts) > 1 and len({part.rank for part in parts}) == 1
    one_scale = len({part.scale for part in parts}) == 1
    if shared and not (one_scale and all(np.array_equal(own("lora_a", parts[0]), own("lora_a", p)) for p in parts)):
        shared = not any(np.any(own("lora_b", part)) for part in parts)
    rank = there[0].rank if shared else sum(part.rank for part in there)
    scale = there[0].scale

    def a() -> np.ndarray:
        return np.concatenate([own("lora_a", part) for part in (there[:1] if shared else there)])

    def b() -> np.ndarray:
        blocks, column = [], 0
        for part, lie in zip(parts, lies, strict=True):
            block = np.zeros(lie.lora_b.shape(dims), np.float32)
            if part.rank:
                ratio = np.float64(part.scale / scale)  # with the product in float64 B is rounded once
                block[..., column : column + part.rank] = own("lora_b", part) * ratio
                column += 0 if shared else part.rank
            blocks.append(block)
        return outputs["lora_b"].whole(blocks, dims)

    def magnitude() -> np.ndarray:
        return outputs["magnitude"].whole([own("magnitude", part) for part in parts], dims)

    dims, lies = dims | {"R": rank}, [Lies.of(part.row) for part in parts]
    outputs = {name: Fused(tuple(getattr(lie, name) for lie in lies)) for name in ("lora_b", "magnitude")}
    tensors = {
        "lora_a": Planned(lies[0].lora_a.shape(dims), a),
        "lora_b": Planned(outputs["lora_b"].shape(dims), b),
    }
    if adapter.dora:
        tensors["magnitude"] = Planned(outputs["magnitude"].shape(dims), magnitude)
    return _Update(module, rank, scale, {f"{module}.{_KEYS[name]}": planned for name, planned in tensors.items()})


def _alpha(update: _Update, adapter: Adapter) -> int | float:
    """From which PEFT makes the scale again."""
    alpha = update.scale * (update.rank**0.5 if adapter.rslora else update.rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _whole(model: Model, leaves: Mapping[str, Any]) -> dict[str, Planned]:
    """Tensors that were trained whole, by name."""
    leaves = {path: leaf for path, leaf in leaves.items() if not is_adapter(path) and table_of(path) is None}
    names, dims = model.config.family.names, sizes(model.config)
    there = {names.row_of(path).name for path in by_path(model.plain().abstract())}
    for path in leaves:  # PEFT saves modules: a tensor is all of its parts, and a weight comes with its bias
        module = names.row_of(path).name.rpartition(".")[0]
        if names.has_another(names.row_of(path).name):  # PEFT goes by the modules of one version of transformers
            raise _no_form(f"{module} is trained whole, which versions of transformers call differently", "it frozen")
        of_module = [row.path for row in names.rows if row.name.rpartition(".")[0] == module and row.name in there]
        if missing := [other for other in of_module if other not in leaves]:
            raise _no_form(f"{path} is trained and {', '.join(missing)} is not", f"all of {module}")
    found = {}
    for fused, index in names.in_order({path: leaf.shape for path, leaf in leaves.items()}) if leaves else ():

        def make(fused=fused, index=index) -> np.ndarray:
            parts = [row.to_theirs(on_host(leaves[row.path], index), dims) for row in fused.rows]
            return fused.whole(parts, dims)

        found[fused.rows[0].named(index)] = Planned(fused.shape(dims), make)
    if _ties(model, leaves):
        embedding, head = (names.row_of(path).name for path in ("embed/embedding", "lm_head/kernel"))
        found[head] = found[embedding]
    return found


def _ties(model: Model, leaves: Mapping[str, Any]) -> bool:
    """Whether a trained embedding is the head too, which PEFT has under both names."""
    return model.config.tied and model.config.head == "lm" and "embed/embedding" in leaves


def _saved_ends(model: Model, whole: Iterable[str]) -> list[str]:
    """The ends of module names by which PEFT finds those that were trained whole, and no others."""
    names, L = model.config.family.names, model.config.num_layers
    rows = [names.row_of(path) for path in by_path(model.plain().abstract())]
    every = {row.named((layer,)).rpartition(".")[0] for row in rows for layer in range(L if row.stacked else 1)}
    saved = {name.rpartition(".")[0] for name in whole}
    found: dict[str, None] = {}
    for module in sorted(saved):
        end = module.rpartition(".")[2]
        found[end if all(other in saved for other in every if other.endswith(end)) else module] = None
    return list(found)


def _by_end(values: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Values by the last name of modules where all that have it share one, else by the whole name.

    >>> _by_end({"h.0.q": 4, "h.1.q": 4, "h.1.k": 4}, ["h.0.q", "h.1.q", "h.0.k", "h.1.k"])
    {'q': 4, 'h.1.k': 4}
    """
    found = {}
    every = list(modules)
    for module, value in values.items():
        end = module.rpartition(".")[2]
        alike = all(values.get(other) == value for other in every if other.rpartition(".")[2] == end)
        found[end if alike else module] = value
    return found


def _linears(model: Model) -> list[Fused]:
    """The linears of a layer, as they are stored."""
    names = model.config.family.names
    rows = [row for row in names.rows if row.stacked == 1 and row.path.endswith("/kernel")]
    return list(dict.fromkeys(names.fused_of(row) for row in rows))


def _module(fused: Fused, layer: int) -> str:
    return fused.rows[0].named((layer,)).removesuffix(".weight")


def _inputs_first(fused: Fused) -> bool:
    """Whether a weight is stored as Conv1D's, its inputs first."""
    return fused.rows[0].dims.startswith(fused.rows[0].sides()[0][0])

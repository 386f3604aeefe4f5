"""Where a predicted step loses time against the model's own FLOPs at the peak, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.config import get
from jaxalign.plan.predict import Assumptions

_OPTIMISATION = ("data.packing", "batch_size", "model.dtype")  # fields that change what a step learns


def losses_of(
    programs: list[dict[str, Any]], config: Any, mesh: Mapping[str, int], assumed: Assumptions
) -> list[dict[str, Any]]:
    """The causes of what a step takes above its ideal, the largest first.

    Args:
      programs: as `jaxalign.plan.plan` describes them.
      config: of the stage.
      mesh: sizes of its axes.
      assumed: the machine and the numbers of the prediction.

    Returns:
      `program`, `what`, `seconds` of an iteration, `change`: lines of the configuration, or "", and whether these make
      it another optimisation: other batches, or numbers of less precision.
    """
    v, found = assumed.values, []
    top = v["flops"] * v["efficiency"]

    def lost(p: dict[str, Any], what: str, seconds: float, change: str) -> None:
        if seconds > 0:
            one = {"program": p["name"], "what": what, "seconds": seconds * p["times"], "change": change}
            found.append(one | {"changes_optimisation": any(field in change for field in _OPTIMISATION)})

    for p in programs:
        if not p["times"]:
            continue
        flops, time = p["flops"], p["seconds"]
        if "decoding" in p:
            d = p["decoding"]
            least = (d["weights"] + d["cache"]) / (v["bandwidth"] * v["memory_efficiency"])
            lost(p, "weights and cache are read for each token", least * 1.0, _decoding(config, mesh))
            more = time["products"] + time["traffic"] - least
            lost(p, "what is read and written beside weights and cache", more, "")
        else:
            padding = flops["model"] * (1 / p["fill"] - 1) / top
            lost(p, f"padding: {1 - p['fill']:.0%} of the rows", padding, _padding(config))
            extra = (flops["products"] - flops["model"]) / top - padding
            lost(
                p,
                "what the backward pass computes again" if _trains(p) else "products beyond the model's",
                extra,
                _remat(p, config),
            )
            slow = time["products"] - flops["products"] / top
            lost(p, "products that are slow: attention, float32, or bound by memory", slow, _dtype(p, config))
            lost(p, "memory traffic outside of products", time["traffic"], _traffic(p, config))
        kinds: dict[str, float] = {}
        for c in p["collectives"]:
            kinds[c["kind"]] = kinds.get(c["kind"], 0.0) + c["exposed"]
        for kind, seconds in kinds.items():
            lost(p, f"{kind} that nothing hides", seconds, _collective(kind, p, config, mesh))
        often = f", {p['times']:,.0f} times" if p["times"] > 1 else ""
        lost(p, f"gaps between {p['kernels']:,} kernels{often}", time["gaps"], _gaps(p, config))
        if "decoding" not in p:  # which waits for the memory
            below = flops["model"] / top - flops["model"] / v["flops"]
            lost(p, f"products at {v['efficiency']:.0%} of the peak (assumed)", below, "")
    return sorted(found, key=lambda one: -one["seconds"])


def _trains(p: Mapping[str, Any]) -> bool:
    return p["name"] == "train step"


def _remat(p: Mapping[str, Any], config: Any) -> str:
    if not _trains(p) or config.model.remat in ("none", "dots", "auto"):  # auto has taken the fastest that fits
        return ""
    spare = p["memory"]["pool"] - p["memory"]["peak"]
    if spare < 0.1 * p["memory"]["pool"]:
        return f"--config.model.remat=dots --config.grad_accum_steps={2 * config.grad_accum_steps}"
    return "--config.model.remat=dots"


def _padding(config: Any) -> str:
    return "" if config.data.packing or "rewards" in config else "--config.data.packing=True"


def _dtype(p: Mapping[str, Any], config: Any) -> str:
    if p["flops"]["other_dtype"] > 0.02 * p["flops"]["products"] and config.model.dtype == "float32":
        return "--config.model.dtype=bfloat16"
    return ""


def _traffic(p: Mapping[str, Any], config: Any) -> str:
    """What helps where the optimizer's state or gradients that are added up are much of the traffic."""
    if not _trains(p):
        return ""
    params = sum(n for name, n in p["memory"].items() if name.endswith(" params"))
    state = params + p["memory"].get("optimizer", 0)
    if config.grad_accum_steps > 1 and 3 * params * config.grad_accum_steps > 0.2 * p["traffic_bytes"]:
        return f"--config.grad_accum_steps={config.grad_accum_steps // 2}: gradients are added up less often"
    if 2 * state > 0.2 * p["traffic_bytes"]:
        return f"--config.batch_size={2 * config.batch_size}: the optimizer's share halves"
    return ""


def _collective(kind: str, p: Mapping[str, Any], config: Any, mesh: Mapping[str, int]) -> str:
    if kind == "all-reduce" and mesh.get("tensor", 1) > 1 and "decoding" not in p:
        return f"--config.mesh.tensor={mesh['tensor'] // 2}: each layer's sums over tensor"
    if config.grad_accum_steps > 1 and "decoding" not in p:
        half = max(config.grad_accum_steps // 2, 1)
        return f"--config.grad_accum_steps={half}: weights are gathered for every micro-batch"
    if kind in ("all-gather", "reduce-scatter") and "decoding" not in p:
        return f"--config.batch_size={2 * config.batch_size}: more tokens for each gather of the weights"
    return ""


def _gaps(p: Mapping[str, Any], config: Any) -> str:
    if "decoding" not in p and config.grad_accum_steps > 1:
        return f"--config.grad_accum_steps={max(config.grad_accum_steps // 2, 1)}"
    return ""


def _decoding(config: Any, mesh: Mapping[str, int]) -> str:
    if get(config, "rollout.num_slots") and config.rollout.num_slots < config.batch_size:
        return f"--config.rollout.num_slots={config.batch_size}: more completions for each reading of the weights"
    return f"--config.batch_size={2 * config.batch_size}: more completions for each reading of the weights"

"""A model's figures on held-out data without training: loss, accuracy, margins, calibration, perplexity."""

from __future__ import annotations

import gc
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import config as configuration
from jaxalign.errors import InputError
from jaxalign.evaluate.calibration import calibration
from jaxalign.evaluate.perplexity import perplexity
from jaxalign.evaluate.winrate import wilson
from jaxalign.functions import is_name
from jaxalign.ops.losses_preference import PREFERENCE_LOSSES
from jaxalign.ops.losses_reward import reward_loss
from jaxalign.ops.readout import completion_sums
from jaxalign.pair_losses import PAIR_LOSSES, loss_options
from jaxalign.parallel.compiler_options import jit
from jaxalign.parallel.mesh import batch_shards, make_mesh
from jaxalign.parallel.sharding import batch_part, put_batch
from jaxalign.pipeline.loaded import require_head
from jaxalign.pipeline.named import named_config
from jaxalign.steps.preference import by_pair, sequence_logprobs
from jaxalign.steps.reward import completion_scores
from jaxalign.train.named_functions import own_loss
from jaxalign.types import Terms

_ROWS = 16  # of a batch, where no flag says another number

Each = dict[str, np.ndarray]  # per completion [N], or of pairs "chosen" and "rejected" [N] each


def evaluate(
    model: str, data: str | Sequence[str], *, reference: str | None = None, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures a model on records that training would take; the figures are those of training's own evaluations.

    What is measured follows from the model and the data:

    - a reward model on pairs: Bradley-Terry loss, accuracy, margins, calibration;
    - a language model on pairs: with a reference, DPO's loss, accuracy, margins and calibration of the implicit reward;
      without one, how often the chosen completion has the higher log-prob; perplexity of both sides;
    - a language model on completions, dialogues or texts: loss and perplexity of the tokens that training would score.

    Args:
      model: directory or hub id of a language model or a reward model.
      data: one or several sources in any format that training reads.
      reference: directory or hub id; what a DPO model started from.
      flags: fields of the stage whose evaluation this is, as `--FIELD=VALUE`: `--max_length=512`, `--beta=0.1`.

    Returns:
      JSON values: `figures` by the names that training gives them, `calibration` (bins), `records` (what was read, used
      and dropped), and what was evaluated.

    Raises:
      InputError: a model, a reference or data that cannot be used.
    """
    scalar = _has_score(model)
    pairs = _holds_pairs(data)
    if scalar and not pairs:
        raise InputError(
            f"--model {model} is a reward model, and {_shown(data)} holds no pairs", "pairs", "--data pairs.jsonl"
        )
    if reference and (scalar or not pairs):
        what = "a reward model" if scalar else "data without pairs"
        raise InputError(f"--reference with {what}", "a language model on pairs", "without --reference")
    if reference:
        require_head(reference, "lm", "--reference")
    algorithm = "reward" if scalar else "dpo" if pairs else "sft"
    sources = [data] if isinstance(data, str) else list(data)
    own = [f"--data={source if isinstance(source, str) else json.dumps([source])}" for source in sources]
    if pairs and not scalar:
        own += [f"--algorithm.reference_path={reference}"] if reference else ["--algorithm.reference=none"]
    with tempfile.TemporaryDirectory(prefix="jaxalign-evaluate-") as scratch:
        flags = [f"--model={model}", *own, f"--out={scratch}", *flags]
        config, _ = named_config(algorithm, flags)
        _check_flags(config, reference, scratch)
        mesh = make_mesh(config.mesh)
        with config.unlocked():
            default = config.batch_size == configuration.defaults(algorithm).batch_size
            rows = (_ROWS if default else config.batch_size) // config.grad_accum_steps  # at a time, as training takes
            config.batch_size = max(-(-rows // batch_shards(mesh)), 1) * batch_shards(mesh)
            config.grad_accum_steps = 1
            config.data.shuffle, config.model.remat = False, "none"
        with jax.set_mesh(mesh):
            found = _measured(config, mesh, scratch)
    return {"model": model, "reference": reference, "data": sources, "algorithm": algorithm, **found}


def _check_flags(config: Any, reference: str | None, scratch: str) -> None:
    """Refuses flags that would measure something else than the command says."""
    own = {"data.eval_fraction": 0.0, "data.eval_sources": (), "workdir": scratch}
    if "reference" in config.algorithm:
        own |= {
            "algorithm.reference": "live" if reference else "none", "algorithm.reference_path": reference,
        }  # fmt: skip
    for field, value in own.items():
        given = configuration.get(config, field)
        if given != value and not (given is None and value in (None, ())):
            raise InputError(
                f"--{field}={given}",
                "fields of lengths, loss and columns: model, reference and records are given by the command's own",
                f"without --{field}" + ("; --reference DIR" if field.startswith("algorithm.reference") else ""),
            )


def _has_score(model: str) -> bool:
    """Whether a model has a scalar head; its tokenizer and config are read and checked."""
    from jaxalign.models.config import read_config
    from jaxalign.models.hub import locate

    config = read_config(locate(model, weights=False), dtype="float32", param_dtype="float32", remat="none")
    require_head(model, config.head, "--model")
    return config.head == "score"


def _holds_pairs(data: str | Sequence[str]) -> bool:
    """Whether the first record of each source is a pair."""
    from jaxalign.data.mixture import load_records

    sources = [data] if isinstance(data, str) else data
    firsts = [load_records(source, None, max_records=1, field="data.sources")[0][0] for source in sources]
    for record in firsts:
        if record.chosen is None and record.completion is None and record.messages is None and record.text is None:
            raise InputError(
                f"{record.source} holds prompts without answers",
                "pairs, completions, dialogues or texts",
                f"jaxalign compare --base DIR --aligned DIR --data {record.source} --reward DIR_OR_FUNCTION",
            )
    kinds = {record.chosen is not None for record in firsts}
    if len(kinds) > 1:
        raise InputError("sources with pairs and sources without", "one kind at a time", "one --data")
    return kinds.pop()


def _measured(config: Any, mesh: jax.sharding.Mesh, scratch: str) -> dict[str, Any]:
    """The figures of one stage's models on its data."""
    from jaxalign.train.models import fit_length
    from jaxalign.train.rundir import RunDir
    from jaxalign.train.stage import Stage

    configuration.validate(config)
    config, told = fit_length(config)
    for sentence in told:
        print(f"warning: {sentence}", file=sys.stderr)
    directory = RunDir(scratch)
    directory.make()
    stage = Stage(config, mesh, directory)
    stage.check_weights()
    role = stage.program.trained[stage.program.exported]
    reference = stage.program.frozen.get("ref")
    if role.model.config.head == "score":
        each = _each(stage, role, completion_scores, role.model.score_kernel)
        _check_finite(config, each)
        figures, margins = _of_scores(each, config)
    else:
        each = _each(stage, role, sequence_logprobs, role.model.head)
        if "chosen" in each:
            gc.collect()  # one model in memory
            ref = None if reference is None else _each(stage, reference, sequence_logprobs, reference.model.head)
            _check_finite(config, each, ref)
            figures, margins = _of_logprobs(each, ref, config)
        else:
            _check_finite(config, each)
            figures, margins = _of_texts(each), None
    records = stage.dataset.report.get("records", {})
    result: dict[str, Any] = {"records": records, "figures": {k: _finite(v) for k, v in figures.items()}}
    if margins is not None:
        error, bins = calibration(margins, each["weight"])
        result["figures"]["calibration/ece"] = _finite(error)
        result["calibration"] = [b._asdict() for b in bins]
    if "rewards/accuracies" in figures or "logps/accuracies" in figures:
        count = int(np.sum(each["weight"] > 0))
        share = figures.get("rewards/accuracies", figures.get("logps/accuracies"))
        result["num_pairs"] = count
        result["accuracy_interval"] = list(wilson(share * count, count, confidence=0.95))
    return result


def _each(stage: Any, role: Any, measure: Callable[..., jax.Array], head: Callable[[Any], Any]) -> Each:
    """What a model gives to each completion or pair of the stage's data, in the order of the batches."""
    pairs = "pair" in stage.dataset.reads.forms

    @jit
    def values(params, batch) -> dict[str, jax.Array]:
        tokens = completion_sums(batch.readouts.mask, batch.readouts, batch.completions.mask.shape[1])
        value, weight = measure(role.model.apply, head, params, batch), batch.completions.weight
        if not pairs:
            weight = jnp.where(batch.completions.mask, weight, 0)
            return {"value": value.reshape(-1), "tokens": tokens.reshape(-1), "weight": weight.reshape(-1)}
        found, counts = by_pair(value, batch), by_pair(tokens, batch)
        return {
            **{side: found[side] for side in ("chosen", "rejected")},
            **{f"tokens_{side}": counts[side] for side in ("chosen", "rejected")},
            "weight": by_pair(weight, batch)["chosen"],
            "score": by_pair(batch.completions.score, batch)["chosen"],
        }

    params = role.load()
    parts: list[Each] = []
    for index in range(stage.dataset.batches_per_epoch):
        batch = put_batch(stage.dataset.batch(index, *batch_part(stage.mesh)), stage.mesh)
        parts.append(jax.device_get(values(params, batch)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_finite(config: Any, *models: Each | None) -> None:
    """Refuses numbers that are none: an accuracy would count them as wrong."""
    for each in filter(None, models):
        counted = each["weight"] > 0
        for name in ("value", "chosen", "rejected"):
            if name in each and (bad := int(np.sum(~np.isfinite(each[name][counted])))):
                raise InputError(
                    f"{bad:,} of {int(counted.sum()):,} completions have no finite log-prob or score",
                    "a model that computes finite numbers",
                    "--model.dtype=float32" if config.model.dtype != "float32" else "another checkpoint of the model",
                )


def _means(terms: Terms) -> dict[str, float]:
    """A loss over all pairs as over one batch, and its metrics."""
    loss = float(jnp.sum(terms.loss * terms.weight) / jnp.sum(terms.weight))
    return {"loss": loss} | {name: float(total / weight) for name, (total, weight) in terms.metrics.items() if weight}


def _of_scores(each: Each, config: Any) -> tuple[dict[str, float], np.ndarray]:
    cfg = config.algorithm
    margin = jnp.asarray(each["score"]) if cfg.use_margin else None
    terms = reward_loss(
        jnp.asarray(each["chosen"]),
        jnp.asarray(each["rejected"]),
        jnp.asarray(each["weight"]),
        margin=margin,
        center_coef=cfg.center_coef,
        label_smoothing=cfg.label_smoothing,
    )
    return _means(terms), each["chosen"] - each["rejected"]


def _of_logprobs(each: Each, ref: Each | None, config: Any) -> tuple[dict[str, float], np.ndarray | None]:
    """Of pairs: DPO's figures with a reference, those of the log-probs alone without one."""
    sides = ("chosen", "rejected")
    weight = each["weight"]
    counted = weight > 0
    figures = {
        f"perplexity/{side}": perplexity(
            list(map(float, each[side][counted])), list(map(int, each[f"tokens_{side}"][counted]))
        )
        for side in sides
    }
    cfg = config.algorithm
    if ref is None:
        mean = {side: each[side] / np.maximum(each[f"tokens_{side}"], 1) for side in sides}
        total = weight.sum()
        figures |= {
            **{f"logps/{side}": float((weight * each[side]).sum() / total) for side in sides},
            "logps/accuracies": float((weight * (each["chosen"] > each["rejected"])).sum() / total),
            "logps/accuracies_per_token": float((weight * (mean["chosen"] > mean["rejected"])).sum() / total),
        }
        if cfg.loss not in PAIR_LOSSES or PAIR_LOSSES[cfg.loss].reference is not False:
            return figures, None
        ref = {side: np.zeros_like(each[side]) for side in sides}
        return _of_losses(each, ref, cfg) | figures, None
    margins = cfg.beta * ((each["chosen"] - ref["chosen"]) - (each["rejected"] - ref["rejected"]))
    return _of_losses(each, ref, cfg) | figures, margins


def _of_losses(each: Each, ref: Each, cfg: Any) -> dict[str, float]:
    """The weighted sum of the losses on pairs, and the metrics of the first."""
    sides = ("chosen", "rejected")
    arrays = (
        {side: jnp.asarray(each[side]) for side in sides},
        {side: jnp.asarray(ref[side]) for side in sides},
        {side: jnp.asarray(each[f"tokens_{side}"]) for side in sides},
        jnp.asarray(each["weight"]),
    )
    found, options = [], {"label_smoothing": cfg.label_smoothing} | loss_options(cfg)
    for name, coef in ((cfg.loss, 1.0), *cfg.extra_losses):
        function = own_loss(name) if is_name(name) else PREFERENCE_LOSSES[name]
        taken = inspect.signature(function).parameters
        own = {field: value for field, value in options.items() if field in taken}
        terms = function(*arrays, beta=cfg.beta, **own)
        if is_name(name):  # training divides by the pairs' weights, whatever those of the terms are
            terms = terms._replace(loss=jnp.where(arrays[3] != 0, terms.loss, 0), weight=arrays[3])
        found.append((coef, _means(terms)))
    return found[0][1] | {"loss": sum(coef * figures["loss"] for coef, figures in found)}


def _of_texts(each: Each) -> dict[str, float]:
    """Of completions, as SFT weighs them: each scored token alike, times its record's weight."""
    tokens = float((each["weight"] * each["tokens"]).sum())
    if not tokens:
        raise InputError("no token that is scored", "completions to measure", "--train_on=all, or other data")
    loss = -float((each["weight"].astype(np.float64) * each["value"]).sum()) / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else ", ".join(d if isinstance(d, str) else str(d["path"]) for d in data)


# (figure, what it is called on the page, format)
_PAGE = (
    ("rewards/accuracies", "accuracy", "{:.1%}"),
    ("logps/accuracies", "chosen has the higher log-prob", "{:.1%}"),
    ("logps/accuracies_per_token", "the same per token", "{:.1%}"),
    ("rewards/margins", "margin", "{:.4g}"),
    ("rewards/chosen", "reward of the chosen", "{:.4g}"),
    ("rewards/rejected", "reward of the rejected", "{:.4g}"),
    ("rewards/ties", "ties", "{:.1%}"),
    ("calibration/ece", "expected calibration error", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("perplexity/chosen", "perplexity of the chosen", "{:.3f}"),
    ("perplexity/rejected", "perplexity of the rejected", "{:.3f}"),
    ("logps/chosen", "log-prob of the chosen, nats", "{:.2f}"),
    ("logps/rejected", "log-prob of the rejected, nats", "{:.2f}"),
)


def page(result: dict[str, Any]) -> str:
    """The result of `evaluate` for people."""
    figures, lines = result["figures"], []
    beside = f" against {result['reference']}" if result["reference"] else ""
    lines.append(f"{result['model']}{beside} on {_shown(result['data'])}")
    if "num_pairs" in result:
        lines.append(f"  {'pairs':<32}{result['num_pairs']:,}")
    elif "tokens" in figures:
        lines.append(f"  {'scored tokens':<32}{figures['tokens']:,.0f}")
    accuracy = next((name for name in ("rewards/accuracies", "logps/accuracies") if name in figures), None)
    for name, words, form in _PAGE:
        if figures.get(name) is not None:
            interval = ""
            if name == accuracy:
                low, high = result["accuracy_interval"]
                interval = f"  (95% interval {low:.1%} to {high:.1%})"
            lines.append(f"  {words:<32}{form.format(figures[name])}{interval}")
    dropped = {name: n for name, n in (result["records"].get("dropped") or {}).items() if n}
    if dropped:
        lines.append(f"  left out: {', '.join(f'{n:,} {name}' for name, n in dropped.items())}")
    return "\n".join(lines)

"""Checks between fields of a configuration, and fields that have no effect given the others."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.errors import InputError
from jaxalign.functions import is_name
from jaxalign.ranges import LEAST_TEMPERATURE, QUANTISED, TRACKERS, TRAIN_ON, TRAIN_ON_ROLES, misfit, shown
from jaxalign.registry import ALGORITHMS, Algorithm


def check(c: Any, inputs: bool) -> None:
    """Checks between fields.

    Args:
      c: one stage's configuration, each field already checked by itself.
      inputs: whether required inputs must be set.

    Raises:
      InputError: naming the fields and a flag that would do.
    """
    if c.batch_size % c.grad_accum_steps:
        raise InputError(
            f"batch_size {c.batch_size} is not divisible by grad_accum_steps {c.grad_accum_steps}",
            "equal micro-batches",
            f"--config.batch_size={-(-c.batch_size // c.grad_accum_steps) * c.grad_accum_steps}",
        )
    if c.model.param_dtype == "bfloat16":
        low = min(c.optimizer.learning_rate, c.optimizer.get("value_learning_rate", 1.0))
        if low < 1e-4:
            frozen = " --config.model.frozen_dtype=bfloat16" * bool(c.adapter.rank)
            raise InputError(
                f"bfloat16 weights at a learning rate of {low:g}",
                "float32 weights below 1e-4: at 5e-7 one percent of bfloat16 weights move in a step",
                f"--config.model.param_dtype=float32{frozen} (the computation may stay in bfloat16)",
            )
    _check_adapter(c)
    _check_tokens(c.model.add_tokens)
    in_part = c.adapter.rank or c.model.train
    if c.model.frozen_dtype in QUANTISED and not (in_part or ALGORITHMS[c.algorithm.name].frozen):
        raise InputError(
            f"model.frozen_dtype is {c.model.frozen_dtype!r}, and every parameter is trained",
            "an adapter over quantised kernels, or whole kernels",
            "--config.adapter.rank=16, or --config.model.frozen_dtype=None",
        )
    if c.optimizer.weight_decay and is_name(c.optimizer.name):
        raise InputError(
            f"optimizer.weight_decay is {c.optimizer.weight_decay:g} with an optimizer of your own",
            "0: the function decays by itself",
            "--config.optimizer.weight_decay=0",
        )
    if c.optimizer.state_dtype and c.optimizer.name == "muon":
        raise InputError(
            f"optimizer.state_dtype {c.optimizer.state_dtype!r} with muon",
            "None: muon's momentum has the parameters' dtype",
            "--config.optimizer.state_dtype=None",
        )
    if c.optimizer.name == "schedule_free":
        _check_schedule_free(c)
    if c.optimizer.state_dtype and c.optimizer.name == "sgd" and not c.optimizer.b1:
        raise InputError(
            f"optimizer.state_dtype {c.optimizer.state_dtype!r} with sgd without momentum",
            "an optimizer that keeps something between steps",
            "--config.optimizer.state_dtype=None, or --config.optimizer.b1=0.9 for momentum",
        )
    if c.checkpoint.patience and not c.checkpoint.best_metric:
        raise InputError(
            f"checkpoint.patience is {c.checkpoint.patience} without a checkpoint.best_metric",
            "the eval metric that is to become better",
            "--config.checkpoint.best_metric=eval/loss, or --config.checkpoint.patience=None",
        )
    if c.checkpoint.best_metric:
        _check_evaluated(c)
    template_kwargs(c.data.chat_template_kwargs)
    _check_train_on(c.data.get("train_on"))
    _check_mesh(c.mesh)
    _check_trackers(c.logging)
    if "rollout" in c:
        _check_stop(c.rollout.stop)
        if 0 < c.rollout.temperature < LEAST_TEMPERATURE:
            raise InputError(
                f"rollout.temperature is {c.rollout.temperature:g}",
                f"{LEAST_TEMPERATURE} and more, or (dpo) 0 for the likeliest token",
                "--config.rollout.temperature=1.0",
            )
    ALGORITHMS[c.algorithm.name].check(c, inputs)


def template_kwargs(given: Any, flag: str = "--config.data.chat_template_kwargs") -> dict[str, Any]:
    """The values of a chat template's names, from the forms in which they are given.

    Args:
      given: dicts, or pairs of a name and a value; None for none.
      flag: what gave them, for messages.

    Raises:
      InputError: something else, or a value that is not of JSON.

    >>> template_kwargs(({"enable_thinking": False},)) == template_kwargs([["enable_thinking", False]])
    True
    """
    found: dict[str, Any] = {}
    example = f"{flag}='{{\"enable_thinking\": false}}'"
    for item in given or ():
        pairs = list(item.items()) if isinstance(item, Mapping) else [item]
        for pair in pairs:
            named = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)
            if not named or not pair[0].isidentifier():
                raise InputError(f"{flag} holds {shown(pair)}", "names and their values, as JSON", example)
            name, value = pair
            if name in found:
                raise InputError(f"{flag} gives {name!r} twice", "each name once", example)
            try:
                found[name] = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError):
                raise InputError(f"{flag} gives {name!r} {shown(value)}", "a value of JSON", example) from None
    return found


def check_lengths(c: Any, usual: Any, max_length: int) -> list[str]:
    """Checks that prompts, completions and rows fit `max_length`.

    Args:
      c: one stage's configuration.
      usual: its algorithm's defaults.
      max_length: tokens of prompt + completion.

    Returns:
      What is cut short, a sentence each.

    Raises:
      InputError: naming the fields and a flag that would do.
    """
    for field in ("max_prompt_length", "max_completion_length"):
        value = c.data.get(field)
        if value is not None and value >= max_length:
            raise InputError(
                f"data.{field} is {value}, data.max_length {max_length}",
                "room for the other part",
                f"--config.data.{field}={max_length // 2}",
            )
    turned = c.model.get("rope_length")  # a run of an earlier version has no such field
    if turned is not None and turned < max_length:
        raise InputError(
            f"model.rope_length is {turned:,}, data.max_length {max_length:,}",
            "the length of the longest sequence, or more",
            f"--config.model.rope_length={max_length}",
        )
    asked = c.rollout.max_new_tokens if "rollout" in c else 0
    if ALGORITHMS[c.algorithm.name].reads.readout == "none" and asked >= max_length:  # what is sampled is trained on
        raise InputError(
            f"rollout.max_new_tokens {asked}, data.max_length {max_length}",
            "room for a prompt: max_length limits prompt + completion",
            f"--config.rollout.max_new_tokens={max_length // 2}"
            if c.data.max_length is None
            else f"--config.data.max_length={asked * 2}",
        )
    if asked > max_length and asked != usual.rollout.max_new_tokens and c.logging.samples_every:
        return [f"rollout.max_new_tokens is {asked:,}: samples end at data.max_length, {max_length:,} tokens"]
    return []


def _check_evaluated(c: Any) -> None:
    """A best checkpoint is chosen by evaluations; its metric's name is checked when the data are read."""
    missing = [] if c.eval.every else [("eval.every is 0", "--config.eval.every=100")]
    if not _is_evaluated(c):
        missing.append(("there is nothing to evaluate on", "--config.data.eval_fraction=0.05"))
    if missing:
        found, flags = zip(*missing, strict=True)
        raise InputError(
            f"checkpoint.best_metric is {c.checkpoint.best_metric!r} but {' and '.join(found)}",
            "evaluations of held-out data to choose by",
            " ".join(flags),
        )


def _check_adapter(c: Any) -> None:
    """Patterns, and pairs of them and numbers; whether a pattern matches is checked when the model is known."""
    for field, pattern, example, least in (
        ("adapter.rank_pattern", "q_proj", 8, 1),
        ("adapter.alpha_pattern", "q_proj", 16.0, 1e-6),
        ("optimizer.rate_factors", "lora_b", 16.0, 0),
    ):
        section, leaf = field.split(".")
        for item in c[section][leaf]:
            whole = isinstance(example, int)
            usual = f"--config.{field}='((\"{pattern}\", {example}),)'"
            if not isinstance(item, (tuple, list)) or len(item) != 2 or not _is_pattern(item[0]):
                raise InputError(f"{field} holds {shown(item)}", "pairs of a pattern and a number", usual)
            try:
                re.compile(f"(?:{item[0]})")  # it is a part of a longer one
            except re.error as error:
                expected = "pairs of a regular expression and a number"
                raise InputError(f"{field} {item[0]!r}: {error}", expected, usual) from error
            if expected := misfit(item[1], least, 1 << 14 if whole else 1e6, whole=whole):
                raise InputError(
                    f"{field} gives {item[0]!r} {shown(item[1])}",
                    expected,
                    f"--config.{field}='((\"{item[0]}\", {example}),)'",
                )
    for field in ("adapter.targets", "model.train"):
        section, leaf = field.split(".")
        given = c[section][leaf]
        if field == "adapter.targets" and not given and c.adapter.rank:
            raise InputError(
                "adapter.targets is empty", "patterns, or all-linear", "--config.adapter.targets=all-linear"
            )
        for pattern in given:
            if not _is_pattern(pattern):
                raise InputError(f"{field} holds {shown(pattern)}", "patterns of names", f"--config.{field}=None")
            if re.search(r"\[([^][]*,)?\s*added\s*(,[^][]*)?\]$", pattern) and not c.model.add_tokens:
                raise InputError(
                    f"{field} {pattern!r}, and no tokens are added",
                    "model.add_tokens, or the ids of tokens: embed[128256:]",
                    "--config.model.add_tokens='<|im_start|>,<|im_end|>'",
                )
    if c.optimizer.rate_factors and (c.optimizer.name == "schedule_free" or is_name(c.optimizer.name)):
        raise InputError(
            f"optimizer.rate_factors with optimizer.name={c.optimizer.name}",
            "an optimizer whose updates are scaled by the learning rate last",
            "--config.optimizer.name=adamw, or --config.optimizer.rate_factors=None",
        )


def _check_tokens(tokens: Any) -> None:
    """The tokens that a tokenizer gets."""
    for i, token in enumerate(tokens):
        found = f"model.add_tokens holds {shown(token)}"
        if not isinstance(token, str) or not token or token != token.strip():
            expected = "texts that neither begin nor end with a space"
        elif token in tokens[:i]:
            found, expected = f"{found} twice", "each token once"
        else:
            continue
        raise InputError(found, expected, '--config.model.add_tokens=\'["<|im_start|>", "<|im_end|>"]\'')


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_schedule_free(c: Any) -> None:
    """What schedule-free's average x, which is computed from the weights y and the state's z, does not go with."""
    o, dtype = c.optimizer, c.model.param_dtype
    for field, value, allowed, expected, fix in (
        ("optimizer.schedule", o.schedule, o.schedule == "constant", "constant: averaging replaces decay", "constant"),
        ("optimizer.b1", o.b1, o.b1 >= 0.5, "0.5 or more: the share of the average in the weights", 0.9),
        ("optimizer.state_dtype", o.state_dtype, o.state_dtype != "bfloat16", "None or int8: z needs its digits", None),
        ("model.param_dtype", dtype, dtype != "bfloat16", "float32: the average needs all digits", "float32"),
    ):
        if not allowed:
            raise InputError(
                f"{field} is {shown(value)} with optimizer.name=schedule_free",
                expected,
                f"--config.{field}={fix}",
            )


def _check_train_on(train_on: str | None) -> None:
    """`data.train_on`: a word, or roles joined by commas."""
    roles = (train_on or "").replace(" ", "").split(",")
    if train_on is None or train_on in TRAIN_ON or set(roles) <= set(TRAIN_ON_ROLES):
        return
    strange = next(role for role in roles if role not in TRAIN_ON_ROLES)
    near = difflib.get_close_matches(strange, (*TRAIN_ON, *TRAIN_ON_ROLES), n=1, cutoff=0.0)
    raise InputError(
        f"data.train_on is {train_on!r}",
        f"one of {', '.join(TRAIN_ON)}, or roles joined by commas, of {', '.join(TRAIN_ON_ROLES)}",
        f"--config.data.train_on={near[0] if near else TRAIN_ON[0]}",
    )


def _check_trackers(cfg: Any) -> None:
    for name in cfg.trackers:
        if name not in TRACKERS:
            near = difflib.get_close_matches(str(name), TRACKERS, n=1, cutoff=0.0)
            raise InputError(
                f"logging.trackers holds {shown(name)}",
                f"names of {', '.join(TRACKERS)}",
                f"--config.logging.trackers={near[0] if near else TRACKERS[0]}",
            )
    for tag in cfg.tags:
        if not isinstance(tag, str) or not tag.strip():
            raise InputError(f"logging.tags holds {shown(tag)}", "words", "--config.logging.tags=first,second")
    if cfg.run_name and (len(cfg.run_name) > 128 or not cfg.run_name.isprintable()):
        raise InputError(
            f"logging.run_name is {shown(cfg.run_name)}",
            "one line of at most 128 characters, as trackers take it",
            "--config.logging.run_name=dpo-beta-0.1",
        )


def _check_mesh(sizes: Any) -> None:
    for axis, size in sizes.items():
        if size == 0:
            raise InputError(f"mesh.{axis} is 0", "a positive number, or -1 for the rest", f"--config.mesh.{axis}=1")
    rest = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise InputError(f"{' and '.join(rest)} are -1", "at most one -1", f"--config.{rest[0]}=1")


def _check_stop(stop: Any) -> None:
    """`rollout.stop`: whether the tokens exist is checked when the tokenizer is loaded."""
    for item in stop:
        if not (isinstance(item, str) and item) and misfit(item, 0, (1 << 31) - 1, whole=True):
            raise InputError(
                f"rollout.stop holds {shown(item)}",
                "tokens: ids, which are whole numbers from 0 on, or strings",
                "--config.rollout.stop=\"('</s>',)\"",
            )


def _where(reads: Callable[[Algorithm], bool]) -> tuple[Callable[[Any], bool], str]:
    """Whether a configuration's algorithm reads a field, and the names of those that do."""
    names = [name for name, algorithm in ALGORITHMS.items() if reads(algorithm)]
    words = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return lambda c: reads(ALGORITHMS[c.algorithm.name]), words


_LIKE_ADAM = ("adamw", "muon", "schedule_free")

# (field, whether it is read given the others, what would make it be read)
_READ_WHERE: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("optimizer.b1", lambda c: c.optimizer.name in (*_LIKE_ADAM, "lion", "sgd"), "all but adafactor"),
    ("optimizer.b2", lambda c: c.optimizer.name in (*_LIKE_ADAM, "lion"), "adamw, muon, schedule_free and lion"),
    ("optimizer.eps", lambda c: c.optimizer.name in _LIKE_ADAM, "adamw, muon and schedule_free"),
    ("optimizer.final_fraction", lambda c: c.optimizer.schedule != "constant", "linear and cosine schedules"),
    ("optimizer.decay_mask", lambda c: c.optimizer.weight_decay, "a positive optimizer.weight_decay"),
    ("checkpoint.best_mode", lambda c: c.checkpoint.best_metric, "a checkpoint.best_metric"),
    ("eval.every", lambda c: _is_evaluated(c), "data.eval_sources or data.eval_fraction"),
    ("eval.num_batches", lambda c: _is_evaluated(c), "data.eval_sources or data.eval_fraction"),
    ("data.eval_fraction", lambda c: not c.data.eval_sources, "runs without data.eval_sources"),
    ("data.max_skipped", lambda c: c.data.on_error == "skip", "data.on_error=skip"),
    ("data.row_length", *_where(lambda algorithm: algorithm.reads.readout != "none")),
    ("data.packing", *_where(lambda algorithm: algorithm.reads.readout != "none")),
    (
        "model.frozen_dtype",
        lambda c: ALGORITHMS[c.algorithm.name].frozen or c.adapter.rank or c.model.train,
        f"{_where(lambda algorithm: algorithm.frozen)[1]}, adapters and model.train",
    ),
    *(
        (f"adapter.{field}", lambda c: c.adapter.rank, "a positive adapter.rank")
        for field in ("alpha", "targets", "rank_pattern", "alpha_pattern", "rslora", "dora")
    ),
    ("algorithm.kl_horizon", lambda c: c.algorithm.kl_target is not None, "an algorithm.kl_target"),
    ("logging.num_samples", lambda c: c.logging.samples_every, "a positive logging.samples_every"),
)


def without_effect(c: Any, usual: Any) -> list[str]:
    """Fields that were set but are not read, a sentence each.

    Args:
      c: one stage's configuration.
      usual: its algorithm's defaults.
    """
    found = []
    for field, is_read, where in _READ_WHERE:
        section, leaf = field.split(".")
        value = c[section].get(leaf)
        if value != usual[section].get(leaf) and not is_read(c):
            found.append(f"{field} is {shown(value)} without effect: it is for {where}")
    return found


def _is_evaluated(c: Any) -> bool:
    return bool(c.data.eval_sources or c.data.eval_fraction)

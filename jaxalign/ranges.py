"""What each field of a configuration may hold: tables that `config.validate` reads, and one rule for numbers."""

from __future__ import annotations

import numbers
from typing import Any

from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS

REQUIRED = ("workdir", "model.path", "data.sources")  # these have no default

TRAIN_ON = ("completion", "last", "all")  # or roles, joined by commas:
TRAIN_ON_ROLES = ("assistant", "user", "tool", "system")

# Fields whose value may also be a function of the user's own, "module:function" or "file.py:function".
FUNCTIONS = ("algorithm.loss", "algorithm.estimator", "optimizer.name", "optimizer.schedule")
# Fields that earlier versions did not have, each with the value at which runs of those versions resume.
ADDED: dict[str, Any] = {
    "algorithm.estimator": "gae",
    "checkpoint.patience": None,
    "checkpoint.every_minutes": 30.0,
    "model.rope_length": None,
    "model.train": [],
    "model.add_tokens": [],
    "adapter.rank": 0,
    "adapter.alpha": 32.0,
    "adapter.targets": ["all-linear"],
    "adapter.rank_pattern": [],
    "adapter.alpha_pattern": [],
    "adapter.rslora": False,
    "adapter.dora": False,
    "optimizer.rate_factors": [],
    "algorithm.one_base": False,
    "data.chat_template_kwargs": [],
    "algorithm.discopop_tau": 0.05,
    "algorithm.simpo_gamma": 0.5,
    "algorithm.dpop_lambda": 50.0,
    "algorithm.rdpo_alpha": 0.01,
    "algorithm.extra_losses": [],
}
ADAPTER_RATE = 10  # learning rates of adapters over those of whole models, as guides give them
TRACKERS = ("tensorboard", "wandb", "mlflow")  # of logging.trackers; train/trackers.py has them

QUANTISED = ("int8", "nf4")  # of model.frozen_dtype: layers' kernels alone; ops/quantised.py has them
ANOTHER_REWARD = "reward"  # of checkpoint.resume: resumes although the reward changed

# (field, allowed values)
CHOICES: tuple[tuple[str, tuple], ...] = (
    ("algorithm.name", tuple(ALGORITHMS)),
    *dict.fromkeys(choice for algorithm in ALGORITHMS.values() for choice in algorithm.choices),
    ("model.dtype", ("float32", "bfloat16", "float16", "float64")),
    ("model.param_dtype", ("float32", "bfloat16", "float64")),
    ("model.frozen_dtype", (None, "float32", "bfloat16", "float16", "float64", *QUANTISED)),
    ("model.remat", ("none", "dots", "attention", "offload", "full", "auto")),
    ("model.attention", (None, "blocked", "splash", "triton", "mosaic")),
    ("data.on_error", ("stop", "skip")),
    ("data.truncation", ("drop", "keep_start", "keep_end")),
    ("data.train_on_eos", ("turn", "last", "none")),
    ("data.system_turns", ("keep", "fold", "drop")),
    ("optimizer.name", ("adamw", "adafactor", "lion", "muon", "schedule_free", "sgd")),
    ("optimizer.schedule", ("constant", "linear", "cosine")),
    ("optimizer.decay_mask", ("matrices", "all")),
    ("optimizer.state_dtype", (None, "float32", "bfloat16", "int8")),
    ("checkpoint.best_mode", ("min", "max")),
    ("checkpoint.resume", (True, False, "whole", ANOTHER_REWARD)),
)

# (field, least, greatest), both within the range: every numeric field has a line.  Wide bounds are no
# advice: they only refuse what would overflow a counter or memory.
_MANY = 1_000_000_000  # steps, records: well within 32 bits
_BIG = 1e6  # coefficients
_TOKENS = 1 << 24  # of a sequence
BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, (1 << 31) - 1),
    ("batch_size", 1, 1 << 20),
    ("grad_accum_steps", 1, 1 << 20),
    ("process_timeout", 6, _MANY),
    ("profile", 0, _MANY),
    ("num_train_steps", 1, _MANY),
    ("num_epochs", 1, _MANY),
    ("model.rope_length", 2, _TOKENS),
    ("adapter.rank", 0, 1 << 14),
    ("adapter.alpha", 1e-6, _BIG),
    ("data.max_length", 2, _TOKENS),
    ("data.max_prompt_length", 1, _TOKENS),
    ("data.max_completion_length", 1, _TOKENS),
    ("data.row_length", 2, 2 * _TOKENS),
    ("data.max_records", 1, _MANY),
    ("data.max_skipped", 0, 1),
    ("data.eval_fraction", 0, 0.9),
    ("mesh.data", -1, 1 << 20),
    ("mesh.fsdp", -1, 1 << 20),
    ("mesh.tensor", -1, 1 << 20),
    ("optimizer.learning_rate", 0, _BIG),
    ("optimizer.value_learning_rate", 0, _BIG),
    ("optimizer.warmup_steps", 0, _MANY),
    ("optimizer.b1", 0, 0.999999),
    ("optimizer.b2", 0, 0.999999),
    ("optimizer.eps", 1e-20, 1),
    ("optimizer.max_grad_norm", 0, 1e9),
    ("optimizer.weight_decay", 0, _BIG),
    ("optimizer.final_fraction", 0, 1),
    *dict.fromkeys(bound for algorithm in ALGORITHMS.values() for bound in algorithm.bounds),
    ("rollout.max_new_tokens", 1, _TOKENS),
    ("rollout.num_samples", 1, 1 << 16),
    ("rollout.num_slots", 1, 1 << 20),
    ("rollout.tensor", 1, 1 << 20),
    ("rollout.temperature", 0, 1000),  # see LEAST_TEMPERATURE
    ("rollout.top_k", 0, _MANY),
    ("rollout.top_p", 1e-9, 1),
    ("rewards.scale", -_BIG, _BIG),
    ("rewards.clip", 1e-9, 1e9),
    ("rewards.missing_eos_penalty", 0, 1e9),
    ("eval.every", 0, _MANY),
    ("eval.num_batches", 1, _MANY),
    ("checkpoint.every", 0, _MANY),
    ("checkpoint.every_minutes", 0, _BIG),
    ("checkpoint.keep", 1, _MANY),
    ("checkpoint.patience", 1, _MANY),
    ("logging.every", 1, _MANY),
    ("logging.samples_every", 0, _MANY),
    ("logging.num_samples", 1, 1 << 16),
)
LEAST_TEMPERATURE = 1e-3  # but for 0: logits divided by less overflow
SOURCE_WEIGHT = (1e-6, 10_000)  # of a source in data.sources

# (flag of a command, least, greatest, a value that fits); those that a field stands behind have the field's bounds
_BOUND = {field: (low, high) for field, low, high in BOUNDS}
FLAG_BOUNDS: tuple[tuple[str, float, float, float], ...] = (
    ("seed", *_BOUND["seed"], 0),
    ("temperature", *_BOUND["rollout.temperature"], 1.0),
    ("max_new_tokens", *_BOUND["rollout.max_new_tokens"], 128),
    ("top_k", *_BOUND["rollout.top_k"], 0),
    ("top_p", *_BOUND["rollout.top_p"], 1.0),
    ("beta", *_BOUND["algorithm.beta"], 0.1),
    ("num_prompts", 1, _MANY, 100),
    ("show", 0, _MANY, 5),
    ("confidence", 0.01, 0.9999, 0.95),
)


def bounds(field: str) -> tuple[float, float]:
    """The least and the greatest that a field may hold.

    >>> bounds("batch_size")
    (1, 1048576)
    """
    return _BOUND[field]


def misfit(value: Any, low: float, high: float, *, whole: bool = False) -> str:
    """The one check of numbers: "" for a number within its bounds, else what was expected.

    Args:
      value: anything.
      low: the least that fits; finite.
      high: the greatest.
      whole: whether it must be a whole number.

    Returns:
      What was expected, in words; "" for a number that fits.  NaN fits nothing, booleans are not numbers.

    >>> misfit(0.5, 0, 1), misfit(float("nan"), 0, 1), misfit(True, 0, 1, whole=True)
    ('', 'a number from 0 to 1', 'a whole number from 0 to 1')
    """
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:  # type: ignore[operator]
        return ""
    return f"a {'whole ' if whole else ''}number from {shown(low)} to {shown(high)}"


def shown(value: Any) -> str:
    """A value as messages show it: with thousands separators, and shortened.

    >>> shown(1048576), shown(1e6), shown("x"), shown(10**400)
    ('1,048,576', '1e+06', "'x'", 'a number of 1,329 bits')
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 10**30 else f"a number of {value.bit_length():,} bits"
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def check_flags(**values: Any) -> None:
    """Checks the numeric flags of a command; None stands for a flag that was not given.

    Raises:
      InputError: one that is not a number within its bounds.
    """
    for flag, low, high, example in FLAG_BOUNDS:
        value = values.get(flag)
        if value is None:
            continue
        expected = misfit(value, low, high, whole=isinstance(example, int))
        if flag == "temperature" and not expected and 0 < value < LEAST_TEMPERATURE:
            expected = f"0 for the likeliest token, or {LEAST_TEMPERATURE} and more"
        if expected:
            raise InputError(f"--{flag} {shown(value)}", expected, f"--{flag} {example}")

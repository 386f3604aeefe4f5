"""The algorithms, an entry each: fields with their bounds, the records that it reads, what it needs and what it trains.

Everything else looks an algorithm up here and asks its entry; nothing compares names.  How it trains is its builder in
`train/algorithms.py`, under the same name.  No jax here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import config_dict

from jaxalign import pair_losses
from jaxalign.errors import InputError
from jaxalign.pair_losses import PAIR_LOSSES

_MANY = 1_000_000_000  # completions: well within 32 bits
_BIG = 1e6  # coefficients


class Reads(NamedTuple):
    """What an objective reads: all that the data layer knows of an algorithm."""

    forms: tuple[str, ...]  # of records, see data/forms.py; those of other forms are cut down to the first that can be
    readout: str = "tokens"  # of a completion: a log-prob of each scored token, "last" its last token alone, or "none"
    score: bool = False  # whether the loss may read a record's `score`


COMPLETIONS = Reads(("completion", "messages", "text"))
PAIRS = Reads(("pair",))
PROMPTS = Reads(("prompt",), "none")  # to sample completions from


class Algorithm(NamedTuple):
    """One algorithm as configuration, data and pipeline know it."""

    fields: Callable[[], dict[str, dict[str, Any]]]  # section -> field -> default: its own, and where it differs
    reads: Reads
    method: str = ""  # in words, for the model card
    without: tuple[str, ...] = ()  # fields of all others that it does not read
    frozen: bool = False  # whether it holds a model that is not trained: `model.frozen_dtype` is read
    trained: str = "policy"  # the role that is exported
    head: str = "lm"  # of that role's model: lm, score
    choices: tuple[tuple[str, tuple], ...] = ()  # (field, allowed values)
    bounds: tuple[tuple[str, float, float], ...] = ()  # (field, least, greatest); a name that several have, alike
    guides: tuple[tuple[str, float, float], ...] = ()  # what practitioners' guides give; outside it is a warning
    check: Callable[[Any, bool], None] = lambda config, inputs: None  # see relations.check
    warnings: Callable[[Any], list[str]] = lambda config: []  # a sentence each, of fields that go badly together


def _sft() -> dict[str, dict[str, Any]]:
    return {
        "algorithm": {"name": "sft"},
        "optimizer": {"learning_rate": 2e-5},
        "data": {
            "train_on": "completion",  # its turns; last: its last turn; all: prompts too; or roles: "assistant,tool"
            "train_on_eos": "turn",  # the ends of turns that are trained on: of each turn, last, none
            "packing": True,
        },
    }


def _reward() -> dict[str, dict[str, Any]]:
    return {
        "algorithm": {
            "name": "reward",
            "label_smoothing": 0.0,  # share of labels taken to be wrong
            "center_coef": 0.0,  # adds coef * (r_chosen + r_rejected)^2
            "use_margin": False,  # subtract the records' `margin` column
        },
        "optimizer": {"learning_rate": 1e-5},
        "data": {"shared_prompt": True},  # both completions of a pair in one row around one copy of their prompt
    }


def _dpo() -> dict[str, dict[str, Any]]:
    return {
        "algorithm": {
            "name": "dpo",
            "loss": "sigmoid",  # the loss on pairs
            # ipo alone: log-ratios averaged over a completion's tokens, as in TRL (True, which None means), or summed
            # as in the paper (False); summed, the same aim takes a beta smaller by the completions' length
            "average": config_dict.placeholder(bool),
            "beta": 0.1,  # strength of the KL constraint to the reference
            "label_smoothing": 0.0,  # share of labels taken to be wrong: of sigmoid, robust, exo_pair
            "discopop_tau": 0.05,  # discopop alone: how wide its blend of two losses is
            "simpo_gamma": 0.5,  # simpo alone: the margin between the rewards
            "dpop_lambda": 50.0,  # dpop alone: weight of what the chosen completion falls below the reference
            "rdpo_alpha": 0.01,  # rdpo alone: reward that is put down to each token of length
            "extra_losses": (),  # further losses on the same pairs, each with its weight: (("sft", 0.1),)
            "reference": "live",  # live: a frozen copy; cached: log-probs computed ahead, to disk; none: there is none
            "reference_path": config_dict.placeholder(str),  # directory or hub id; default: the policy's own start
        },
        "optimizer": {"learning_rate": 1e-6},
        "data": {"shared_prompt": True},  # both completions of a pair in one row around one copy of their prompt
        "rollout": _rollout(),
        "logging": _samples(),
    }


def _ppo() -> dict[str, dict[str, Any]]:
    none = config_dict.placeholder
    return {
        "algorithm": {
            "name": "ppo",
            "kl_coef": 0.05,  # weight of the KL penalty in the reward
            "kl_estimator": "k1",  # KL estimator of the penalty: k1 unbiased, k2 low variance, k3 both
            "kl_target": none(float),  # adaptive kl_coef: the target KL, nats per completion; none: kl_coef is fixed
            "kl_horizon": 10_000,  # horizon of the adaptive kl_coef, in completions
            "entropy_coef": 0.0,  # weight of the entropy bonus
            "estimator": "gae",  # of advantages; or file.py:function
            "gamma": 1.0,  # discount of a token
            "gae_lambda": 0.95,  # 0 trusts the values alone, 1 the rewards alone
            "clip_range": 0.2,  # of the probability ratio
            "value_clip_range": 0.2,  # clipping of the value's change from its old value
            "vf_coef": 0.1,  # weight of the value loss
            "num_ppo_epochs": 4,  # passes over an iteration's experience
            "num_minibatches": 1,  # updates in each pass
            "whiten_advantages": True,  # advantages to mean 0 and variance 1 over the iteration's tokens
            "max_approx_kl": none(float),  # early stopping: above it an iteration's remaining updates are skipped
            "offload": False,  # keep frozen weights and optimizer moments in host memory while they are not used
            "one_base": False,  # refuse to hold more than one frozen base: all roles are adapters of one model
            "value_path": none(str),  # what the value model starts from; default: the reward model, or else the policy
        },
        # value_learning_rate: the peak learning rate of the value model
        "optimizer": {"learning_rate": 1e-6, "value_learning_rate": 5e-6, "schedule": "constant"},
        "rewards": _rewards(),
        "rollout": {
            **_rollout(),
            "num_samples": 1,  # completions of each prompt of a batch
            "num_slots": none(int),  # completions decoded at a time, at most; default: all of a batch
        },
        "logging": _samples(),
    }


def _rewards() -> dict[str, Any]:
    none = config_dict.placeholder
    return {
        "model": none(str),  # a reward model's directory or hub id
        "function": none(str),  # "package.module:function" or "file.py:function"
        "scale": 1.0,  # factor of the scores
        "clip": none(float),  # scores are clipped to [-clip, clip] after scaling
        "whiten": False,  # whitens the iteration's token rewards, without shifting the mean
        "normalize": False,  # divides scores by their running standard deviation, after subtracting their running mean
        "missing_eos_penalty": none(float),  # subtracted where a completion did not finish
    }


def _rollout() -> dict[str, Any]:
    return {
        "max_new_tokens": 128,  # tokens of a sampled completion
        "temperature": 1.0,  # of the samples; ppo's log-probs are at the same temperature
        "top_k": 0,  # samples among the k likeliest tokens; 0: off
        "top_p": 1.0,  # samples among the likeliest tokens that make up this share; 1: off
        # devices of mesh.fsdp that split each layer while completions are sampled; default: as few as fit
        "tensor": config_dict.placeholder(int),
        "stop": (),  # more stop tokens, beside the model's own: ids or token strings
    }


def _samples() -> dict[str, Any]:
    return {
        "samples_every": 100,  # steps between samples of the model in training; 0: none
        "num_samples": 4,  # completions of each sampling
    }


def _check_ppo(c: Any, inputs: bool) -> None:
    if c.batch_size % c.algorithm.num_minibatches:
        raise InputError(
            f"batch_size {c.batch_size} is not divisible by num_minibatches {c.algorithm.num_minibatches}",
            "equal minibatches",
            f"--config.algorithm.num_minibatches={_divisor(c.batch_size, c.algorithm.num_minibatches)}",
        )
    if c.algorithm.kl_target is not None and not c.algorithm.kl_coef:
        raise InputError(
            "algorithm.kl_target with a kl_coef of 0",
            "a positive start: the adaptive coefficient is multiplied",
            "--config.algorithm.kl_coef=0.05, or --config.algorithm.kl_target=None",
        )
    if c.rollout.temperature <= 0:
        raise InputError(
            "rollout.temperature is 0",
            "a positive temperature: PPO learns from samples",
            "--config.rollout.temperature=1.0",
        )
    if inputs and not (c.rewards.model or c.rewards.function):
        raise InputError(
            "PPO without a reward",
            "a reward model or a function",
            "--config.rewards.model=DIR or --config.rewards.function=FILE.py:NAME",
        )
    if c.rewards.model and c.rewards.function:
        raise InputError(
            "both rewards.model and rewards.function",
            "one of them",
            "--config.rewards.model=None for the function, --config.rewards.function=None for the model",
        )


def _divisor(n: int, at_most: int) -> int:
    return next(d for d in range(min(at_most, n), 0, -1) if n % d == 0)


_LABEL_SMOOTHING = ("algorithm.label_smoothing", 0, 0.4999)

ALGORITHMS: dict[str, Algorithm] = {
    "sft": Algorithm(
        _sft,
        COMPLETIONS,
        method="supervised fine-tuning",
        guides=(("optimizer.learning_rate", 1e-7, 1e-2),),  # 1e-2: small models from scratch; others start at 2e-5
    ),
    "reward": Algorithm(
        _reward,
        PAIRS._replace(readout="last", score=True),
        method="reward modelling (Bradley-Terry)",
        trained="reward",
        head="score",
        bounds=(_LABEL_SMOOTHING, ("algorithm.center_coef", 0, _BIG)),
        guides=(("optimizer.learning_rate", 1e-7, 1e-2),),
    ),
    "dpo": Algorithm(
        _dpo,
        PAIRS,
        method="direct preference optimization",
        frozen=True,
        choices=(("algorithm.loss", tuple(PAIR_LOSSES)), ("algorithm.reference", ("live", "cached", "none"))),
        bounds=(
            ("algorithm.beta", 1e-9, _BIG),
            _LABEL_SMOOTHING,
            ("algorithm.discopop_tau", 1e-6, 1),
            ("algorithm.simpo_gamma", 0, _BIG),
            ("algorithm.dpop_lambda", 0, _BIG),
            ("algorithm.rdpo_alpha", 0, _BIG),
        ),
        guides=(
            ("algorithm.beta", 0.05, 0.5),
            ("optimizer.learning_rate", 5e-7, 5e-6),
            ("num_epochs", 1, 1),
        ),
        check=pair_losses.check,
        warnings=pair_losses.warnings,
    ),
    "ppo": Algorithm(
        _ppo,
        PROMPTS,
        method="proximal policy optimization",
        without=("data.max_completion_length", "data.append_eos"),  # rollout.max_new_tokens bounds the completion
        frozen=True,
        choices=(("algorithm.kl_estimator", ("k1", "k2", "k3")), ("algorithm.estimator", ("gae",))),
        bounds=(
            ("algorithm.kl_coef", 0, _BIG),
            ("algorithm.kl_target", 1e-9, _BIG),
            ("algorithm.kl_horizon", 1, _MANY),
            ("algorithm.entropy_coef", 0, _BIG),
            ("algorithm.vf_coef", 0, _BIG),
            ("algorithm.gamma", 0, 1),
            ("algorithm.gae_lambda", 0, 1),
            ("algorithm.clip_range", 1e-9, _BIG),
            ("algorithm.value_clip_range", 1e-9, _BIG),
            ("algorithm.num_ppo_epochs", 1, 10_000),
            ("algorithm.num_minibatches", 1, 1 << 20),
            ("algorithm.max_approx_kl", 1e-9, _BIG),
        ),
        guides=(
            ("optimizer.learning_rate", 1e-8, 1e-2),
            ("algorithm.clip_range", 0.1, 0.2),
            ("algorithm.gae_lambda", 0.95, 0.95),
        ),
        check=_check_ppo,
    ),
}


def guides(config: Any) -> list[tuple[str, float, float]]:
    """The ranges that practitioners' guides give, of a loss that reads beta otherwise its own: field, least, greatest.

    Args:
      config: one stage's configuration.
    """
    algorithm = config.algorithm
    loss = PAIR_LOSSES.get(algorithm.loss) if "loss" in algorithm else None
    own = {} if loss is None else {"algorithm.beta": loss.beta}
    return [(field, *own.get(field, (low, high))) for field, low, high in ALGORITHMS[algorithm.name].guides]

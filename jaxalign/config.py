"""The configuration: the checks that run before anything is loaded, and the defaults that algorithms share.

An algorithm's own fields and defaults are those of its entry in `registry.py`.

A config file is a Python file with `get_config()`.  It starts from `defaults(algorithm)` and sets what
differs.  Every tree is locked: a field that does not exist is an error that offers the nearest name.
Only fields that the algorithm reads are in its tree, so that no option is without effect.

No jax here: `jaxalign --help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference, config_dict

from jaxalign import relations
from jaxalign.errors import InputError
from jaxalign.functions import is_name
from jaxalign.ranges import ADAPTER_RATE, CHOICES, FUNCTIONS, REQUIRED, bounds, misfit, shown
from jaxalign.registry import ALGORITHMS, guides


def defaults(algorithm: str, *, adapter: int = 0) -> ConfigDict:
    """The default configuration of one training stage.

    Args:
      algorithm: one of `ALGORITHMS`.
      adapter: the rank of an adapter that is trained in place of the model; its learning rates are ten times as large.

    Returns:
      A locked ConfigDict; required fields are None until set.

    >>> defaults("dpo").algorithm.beta
    0.1
    >>> defaults("ppo").optimizer.learning_rate, defaults("ppo", adapter=16).optimizer.learning_rate
    (1e-06, 1e-05)
    """
    if algorithm not in ALGORITHMS:
        raise InputError(
            f"algorithm {algorithm!r}",
            f"one of {', '.join(ALGORITHMS)}",
            f"defaults({_nearest(algorithm, ALGORITHMS)!r})",
        )
    c, entry = _common(), ALGORITHMS[algorithm]
    for section, values in entry.fields().items():
        if section in c:
            for field, value in values.items():
                c[section][field] = value
        else:
            c[section] = ConfigDict(values)
    for name in entry.without:
        section, field = name.split(".")
        del c[section][field]
    c.adapter.rank = adapter
    suit_adapter(c)
    return c.lock()


def suit_adapter(config: ConfigDict, given: Collection[str] = ()) -> None:
    """Raises the defaults of learning rates to those of an adapter, where one is trained.

    Args:
      config: one stage's configuration, its learning rates the algorithm's defaults but for those given.
      given: fields that were given.
    """
    for field in config.optimizer if config.adapter.rank else ():
        if field.endswith("learning_rate") and f"optimizer.{field}" not in given:
            config.optimizer[field] = float(f"{ADAPTER_RATE * config.optimizer[field]:g}")


def _common() -> ConfigDict:
    none = config_dict.placeholder
    return ConfigDict(
        {
            "seed": 0,  # of initialisation, data order and sampling
            "workdir": none(str),  # the run's directory, on disk or in an object store
            # What this stage starts from, by the name of an earlier stage; see `stages`.
            "from": {
                "model": none(str),  # the earlier stage whose model this one starts from
                "reward": none(str),  # ppo: the earlier stage whose reward model is the reward
            },
            "num_train_steps": none(int),  # batches of the data stream; PPO: iterations. Else num_epochs
            "num_epochs": 1,  # passes over the data, where num_train_steps is not set
            "batch_size": 64,  # rows of a global batch: records, pairs or prompts where rows are not packed
            "grad_accum_steps": 1,  # microbatches of a batch, of evaluations too; the result is that of the whole batch
            "process_timeout": 300,  # seconds without a heartbeat after which another process of the run counts as lost
            "profile": 0,  # steps to profile: time by phase, and a trace in workdir/profile; 0: none
            "callbacks": (),  # "file.py:function" each, called with step, metrics, state at every line of metrics.jsonl
            "model": {
                "path": none(str),  # directory or hub id
                "revision": none(str),  # of a hub id: branch, tag or commit
                "tokenizer": none(str),  # a directory or hub id; default: that of model.path
                "chat_template": none(str),  # a file or a template; default: the tokenizer's own
                # tokens that the tokenizer gets, which it never splits: <|im_start|>,<|im_end|>; the model's vectors of
                # them start as the mean of the others
                "add_tokens": (),
                "from_scratch": False,  # initialise from config.json alone
                # which parameters are trained, patterns of their names: lm_head, layers[-2:], layers.(30|31).mlp; ():
                # all, or with an adapter that alone; a scalar head always is
                "train": (),
                "dtype": "float32",  # of the computation
                "param_dtype": "float32",  # of the trained weights
                "frozen_dtype": none(
                    str
                ),  # of weights that are not trained; int8, nf4: their layers' kernels; default: param_dtype
                "remat": "full",  # kept for the backward pass: all, matmul outputs (on the host), attention, inputs
                "attention": none(str),  # the backend; default: what suits the platform
                # tokens of the longest sequence, for rope types dynamic and longrope alone; default: data.max_length
                "rope_length": none(int),
            },
            "adapter": {  # low-rank updates that are trained beside frozen kernels: LoRA
                "rank": 0,  # of the updates; 0: none, the kernels themselves are trained
                "alpha": 32.0,  # an update is scaled by alpha / rank
                # linears by patterns of the ends of their names, q_proj, layers.(30|31).*; all-linear: all of a layer's
                "targets": ("all-linear",),
                "rank_pattern": (),  # pairs of a pattern and another rank
                "alpha_pattern": (),  # pairs of a pattern and another alpha
                "rslora": False,  # scaled by alpha / sqrt(rank)
                "dora": False,  # magnitudes of the kernels' columns are trained too
            },
            "data": {
                # paths, hub ids or dicts: path, split, name, revision, weight, columns, preset, streaming
                "sources": (),
                "eval_sources": (),  # held-out records, in the form of data.sources
                "eval_fraction": 0.0,  # share of the training records held out where eval_sources is empty
                "max_records": none(int),  # records read from all sources together
                "on_error": "stop",  # at an invalid row; skip: leave it out and count it by reason
                "max_skipped": 0.01,  # share of a source's rows that on_error=skip may leave out
                "max_length": none(int),  # tokens of prompt + completion; default: 1,024, or the models' limit if less
                "max_prompt_length": none(int),  # tokens of the prompt alone
                "max_completion_length": none(int),  # tokens of the completion alone
                # tokens of a row; default: what the data needs, at most max_length (pairs: twice that)
                "row_length": none(int),
                "truncation": "drop",  # what happens to a record that is too long
                "system_turns": "keep",  # fold: into the user's turn that follows; drop: left out
                # what names that the chat template reads stand for, in every rendering and in the export's template:
                # {"enable_thinking": False}, or pairs
                "chat_template_kwargs": (),
                "append_eos": True,  # adds EOS to a completion that lacks it and was not truncated
                "packing": False,  # many records in a row of row_length tokens
                "shuffle": True,  # a new order in each epoch, from the seed
                "cache_dir": none(str),  # where tokenised records are kept; default: workdir/cache
            },
            "mesh": {
                "data": 1,  # devices that split the batch and hold whole parameters; -1: what is left
                "fsdp": -1,  # devices that split the batch and the parameters; -1: what is left
                "tensor": 1,  # devices that split each layer; -1: what is left
            },
            "optimizer": {
                "name": "adamw",  # the optimizer
                "learning_rate": 1e-5,  # peak learning rate
                "schedule": "cosine",  # of the learning rate, after the warmup; schedule_free: constant
                "warmup_steps": 0,  # steps of linear warmup from 0
                "final_fraction": 0.1,  # share of the learning rate at the end of linear and cosine
                "b1": 0.9,  # decay of the first moment; schedule_free: share of the average in the weights
                "b2": 0.999,  # decay of the second moment
                "eps": 1e-8,  # added to the denominator
                "weight_decay": 0.0,  # decoupled, scaled by the learning rate
                "decay_mask": "matrices",  # which weights decay: matrices alone, or all
                # pairs of a pattern of parameters' paths and a factor of their learning rate: (("lora_b", 16.0),)
                "rate_factors": (),
                "max_grad_norm": 1.0,  # gradients are clipped to this norm, by role; 0: no clipping
                "state_dtype": none(str),  # of the optimizer's moments: bfloat16, int8; default: model.param_dtype
            },
            "eval": {
                "every": 0,  # steps between evaluations; 0: at the end only
                "num_batches": none(int),  # of an evaluation; none: all
            },
            "checkpoint": {
                "every": 0,  # steps between checkpoints; 0: by every_minutes, and at the end
                "every_minutes": 30.0,  # minutes between checkpoints, of training that a kill may cost; 0: never
                "keep": 1,  # newest checkpoints kept
                "best_metric": none(str),  # an eval metric; the best checkpoint by it is kept too
                "best_mode": "min",  # whether less or more of best_metric is better
                "patience": none(int),  # evaluations in a row without a better best_metric that end the run; none: off
                # from the last checkpoint; False: never; whole: from the newest that is not damaged; reward: though the
                # reward changed
                "resume": FieldReference(True, field_type=object),
            },
            "logging": {
                "every": 1,  # steps between lines of metrics.jsonl
                "trackers": ("tensorboard",),  # tensorboard (workdir/events), wandb, mlflow; the last two are extras
                "project": none(str),  # of wandb and mlflow; default: jaxalign
                "run_name": none(str),  # there; default: workdir
                "tags": (),  # there
                "progress": True,  # a line on the terminal
            },
        }
    )


def stages(workdir: str | None = None, seed: int = 0, **sections: ConfigDict) -> ConfigDict:
    """Several stages in order, each a whole configuration under its own name.

    A stage reads an earlier one through its `from` field: `dpo["from"].model = "sft"` starts the policy from
    the stage `sft`, `ppo["from"].reward = "reward"` takes the reward model of the stage `reward`.
    A stage works in `workdir/<name>` and its seed is the shared one.

    Raises:
      InputError: no stage, or one that is no configuration.

    >>> c = stages("runs/x", sft=defaults("sft"), dpo=defaults("dpo"))
    >>> c.stages
    ('sft', 'dpo')
    """
    for name, section in sections.items():
        if not isinstance(section, ConfigDict) or "algorithm" not in section:
            raise InputError(
                f"stages(...): {name} is of type {type(section).__name__}, and no stage",
                "one stage's configuration, which starts from defaults(...)",
                f"stages({workdir!r}, {name}=defaults('sft'))",
            )
    if not sections or "stages" in sections:
        raise InputError(
            "stages(...) without a stage" if not sections else "a stage named 'stages'",
            "configurations by the names of their stages",
            f"stages({workdir!r}, sft=defaults('sft'))",
        )
    c = ConfigDict({"seed": seed, "workdir": config_dict.placeholder(str), "stages": tuple(sections)})
    c.workdir = workdir
    for name, section in sections.items():
        c[name] = section
    return c.lock()


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Plain nested dicts with JSON values only, the form that is written to `config.json`."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True, default=_plain))


def _plain(value: ConfigDict | Mapping | os.PathLike) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.to_dict() if isinstance(value, ConfigDict) else dict(value)


def leaves(config: Mapping, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for key in config:
        value = config[key]
        if isinstance(value, (ConfigDict, Mapping)):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _nearest(name: str, names) -> str:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)), "")


def get(config: ConfigDict, field: str, default: Any = None) -> Any:
    """The value of a dotted field, or `default` where the tree does not have it."""
    node: Any = config
    for key in field.split("."):
        if not isinstance(node, (ConfigDict, Mapping)) or key not in node:
            return default
        node = node[key]
    return node


def max_length(config: ConfigDict, positions: int | None = None) -> int:
    """How long prompt and completion may be together: `data.max_length`, or 1,024, or what the models were made for.

    Args:
      config: one stage's configuration.
      positions: `max_position_embeddings` of the models, the least of them; None where it is not known.
    """
    return config.data.max_length or min(1024, positions or 1024)


class Validated(NamedTuple):
    """A stage's configuration that has been validated: it is not validated again."""

    config: ConfigDict
    warnings: tuple[str, ...]


def validated(config: ConfigDict) -> Validated:
    """A configuration and the warnings that `validate` gave."""
    return Validated(config, tuple(validate(config)))


def validate(config: ConfigDict, *, inputs: bool = True) -> list[str]:
    """Checks one stage's configuration before anything is loaded.

    Args:
      config: a tree made from `defaults`.
      inputs: whether required inputs must be set; False while a stage's inputs are not yet known.

    Returns:
      Warnings, a sentence each: values outside the ranges that practitioners' guides give.

    Raises:
      InputError: naming the field, what it may be, and the flag that sets it.
    """
    name = _algorithm(config)
    _check_fields(config, defaults(name))
    if inputs:
        for field in REQUIRED:
            if not get(config, field):
                raise InputError(f"{field} is not set", "a value: it has no default", f"--config.{field}=...")
    for field, allowed in CHOICES:
        value = get(config, field, _ABSENT)
        if value is not _ABSENT and value not in allowed and not (field in FUNCTIONS and is_name(value)):
            near = _nearest(str(value), [str(a) for a in allowed if a])
            raise InputError(
                f"{field} is {value!r}",
                f"one of {', '.join(map(str, allowed))}" + ", or FILE.py:FUNCTION" * (field in FUNCTIONS),
                f"--config.{field}={near}",
            )
    relations.check(config, inputs)
    return (
        check_lengths(config)
        + relations.without_effect(config, defaults(name))
        + ALGORITHMS[name].warnings(config)
        + [
            f"{field} is {get(config, field):g}; guides for {name}{' with an adapter' * (low != usual)} give "
            + (f"{low:g}" if low == high else f"{low:g} to {high:g}")
            for field, usual, low, high in _guides(config)
            if not low <= (get(config, field) or 0) <= high
            and not (field == "num_epochs" and config.num_train_steps is not None)
        ]
    )


def _guides(config: ConfigDict) -> Iterator[tuple[str, float, float, float]]:
    """What practitioners' guides give: the field, the least of whole models, the least and the greatest."""
    for field, low, high in guides(config):
        factor = ADAPTER_RATE if config.adapter.rank and field.endswith("learning_rate") else 1
        yield field, low, factor * low, factor * high


def check_lengths(config: ConfigDict, positions: int | None = None) -> list[str]:
    """The checks of `validate` that depend on `max_length`, for when the models are known; warnings, a sentence each.

    Args:
      config: one stage's configuration.
      positions: as `max_length` takes it.

    Raises:
      InputError: naming the fields that leave no room for each other.
    """
    return relations.check_lengths(config, defaults(config.algorithm.name), max_length(config, positions))


_ABSENT = object()


def _algorithm(config: Any) -> str:
    """The algorithm of a tree, whose fields are that algorithm's."""
    name = get(config, "algorithm.name")
    if name not in ALGORITHMS:
        near = _nearest(str(name), ALGORITHMS)
        raise InputError(
            f"algorithm.name is {name!r}",
            f"one of {', '.join(ALGORITHMS)}, in a tree that starts from defaults(...)",
            f"--config.algorithm.name={near}" if get(config, "algorithm") else f"config = defaults({near!r})",
        )
    found = set(leaves(config))
    apart = {other: len(found ^ set(leaves(defaults(other)))) for other in ALGORITHMS}
    nearest = min(ALGORITHMS, key=lambda other: apart[other])
    if apart[nearest] < apart[name]:
        raise InputError(
            f"algorithm.name is {name!r}, and the fields are those of {nearest}",
            f"{nearest}, or a config of defaults({name!r})",
            f"--config.algorithm.name={nearest}",
        )
    return name


def _check_fields(config: Any, usual: ConfigDict, prefix: str = "") -> None:
    """Each field is there, and holds a value of its type, a number one within its bounds.

    Args:
      config: the tree, or one section of it.
      usual: the same of the algorithm's defaults.
      prefix: the section's name and a dot.
    """
    for key in usual:
        field, default = f"{prefix}{key}", usual[key]
        if key not in config:
            raise InputError(f"there is no field {field}", "all fields of defaults(...)", f"leave {field} as it is")
        value, kind = config[key], usual.get_type(key)
        if isinstance(default, ConfigDict):
            if not isinstance(value, (ConfigDict, Mapping)):
                names = ", ".join(default)
                raise InputError(
                    f"{field} is {shown(value)}",
                    f"a section with the fields {names}",
                    f"leave {field} as it is and set {field}.{next(iter(default))} and the others one by one",
                )
            _check_fields(value, default, f"{field}.")
        elif value is not None:
            _check_value(field, value, default, kind)
        elif default is not None:
            raise InputError(f"{field} is None", f"a value of type {kind.__name__}", f"--config.{field}={default}")
    extra = [key for key in config if key not in usual]
    if extra:
        near = _nearest(str(extra[0]), usual)
        raise InputError(
            f"there is no field {prefix}{extra[0]}",
            f"the nearest name is {prefix}{near}",
            f"--config.{prefix}{near}=...",
        )


def _check_value(field: str, value: Any, default: Any, kind: type) -> None:
    expected, proposed = "", default
    if kind in (int, float):
        low, high = bounds(field)
        expected = misfit(value, low, high, whole=kind is int)
        if default is None:
            proposed = high if isinstance(value, (int, float)) and value > high else low
    elif not isinstance(value, (tuple, list) if kind is tuple else kind):
        expected = f"a value of type {kind.__name__}"
    elif isinstance(value, str) and not value.strip():  # usually a shell variable that is not set
        required = field in REQUIRED
        expected = "a value" if default is not None or required else "a value, or None for none"
        proposed = "..." if required else default
    else:
        expected = _unwritable(value)
    if expected:
        raise InputError(f"{field} is {shown(value)}", expected, f"--config.{field}={proposed}")


def _unwritable(value: Any) -> str:
    """What to expect instead of a string that can be neither in a file nor in a path; "" for any other value."""
    if isinstance(value, str):
        broken = any("\ud800" <= letter <= "\udfff" for letter in value)
        return "text without NUL or halves of surrogate pairs" if broken or "\0" in value else ""
    if isinstance(value, (ConfigDict, Mapping)):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (tuple, list)):
        return next(filter(None, map(_unwritable, value)), "")
    plain = value is None or isinstance(value, (bool, int, float, os.PathLike))
    return "" if plain else "texts, numbers, and dicts or tuples of them"


if __name__ == "__main__":  # python -m jaxalign.config dpo: the fields of an algorithm and their defaults
    for tree in map(defaults, sys.argv[1:] or ALGORITHMS):
        print(*(f"{name} = {get(tree, name)!r}" for name in leaves(tree)), sep="\n", end="\n\n")

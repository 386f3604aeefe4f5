"""`jaxalign train ALGORITHM`: a configuration from flags alone."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jaxalign.config import defaults, get, leaves, suit_adapter
from jaxalign.data.files import is_url
from jaxalign.errors import InputError
from jaxalign.pair_losses import PAIR_LOSSES
from jaxalign.pipeline.mistakes import columns_meant, no_columns, no_field, takers
from jaxalign.pipeline.overrides import override
from jaxalign.registry import ALGORITHMS

# Short flags and their fields; `--reward` stands for one of two.
_FLAGS = {"model": "model.path", "data": "data.sources", "eval_data": "data.eval_sources", "out": "workdir"}
_SWITCHES = ("dry_run",)


def named_config(
    name: str, argv: Sequence[str], *, fill: Mapping[str, object] | None = None, command: str = "train"
) -> tuple[ConfigDict, list[str]]:
    """The configuration that `jaxalign train NAME ...` stands for.

    Args:
      name: an algorithm's.
      argv: the flags behind it: `--model`, `--data`, `--eval_data`, `--out`, `--reward`, `--dry_run`, and any field as
        `--FIELD=VALUE`, where the last part of its name is enough if no other field ends so.
      fill: values of required fields that no flag gives; None: these are errors.
      command: that takes the flags, for messages.

    Returns:
      The configuration, locked, and the switches among the flags.

    Raises:
      InputError: no model, no data, no reward, no such field, or a value that does not fit.

    >>> named_config("dpo", ["--model", "m", "--data=a.jsonl", "--beta=0.2"])[0].algorithm.beta
    0.2
    """
    c = defaults(name)
    given, switches = _flags(argv, command)
    seen: set[str] = set()
    columns: dict[str, object] = {}
    for flag, text in given:
        if flag == "config":
            raise InputError(
                f"both {name} and --config",
                "an algorithm by its name, or a config file",
                f"jaxalign {command} {name} --model DIR --data FILE, or jaxalign {command} --config={text or 'FILE'}",
            )
        if flag in (*_FLAGS, "reward") and not (text or "").strip():
            raise InputError(f"--{flag} is {text or ''!r}", "a value, or the flag left out", f"--{flag}=...")
        if meant := columns_meant(flag, text):
            columns |= meant
            continue
        field = _reward_field(c, text or "") if flag == "reward" else _FLAGS.get(flag) or _field(c, flag, text)
        override(c, field, text, extend=field in seen)
        seen.add(field)
    suit_adapter(c, seen)
    if columns:
        raise no_columns(c, "data.sources", columns, "columns by a flag of their own")
    with c.unlocked():
        c.workdir = c.workdir or f"runs/{name}"
    for field, value in (fill or {}).items():
        if field not in ("rewards.function",) or ("rewards" in c and not c.rewards.model):
            section, leaf = field.split(".")
            c[section][leaf] = c[section][leaf] or value
    _check(name, c, command)
    return c, switches


def _flags(argv: Sequence[str], command: str) -> tuple[list[tuple[str, str | None]], list[str]]:
    """(name, value) of each flag in order, None for one without; and the switches."""
    found: list[tuple[str, str | None]] = []
    switches: list[str] = []
    i = 0
    while i < len(argv):
        flag, equals, text = argv[i].partition("=")
        name = flag.lstrip("-").removeprefix("config.").replace("-", "_")
        if found and not flag.startswith("-") and argv[i - 1] == found[-1][1]:
            several = f"--{found[-1][0]}={shlex.quote(f'{argv[i - 1]},{argv[i]}')}"
            raise InputError(f"{argv[i][:200]!r} behind {argv[i - 1][:200]!r}", "several values with commas", several)
        if not flag.startswith("-") or not name:
            raise InputError(f"argument {argv[i][:200]!r}", "flags: --name=value", f"jaxalign {command} --help")
        value: str | None = text if equals else None
        if name in _SWITCHES and not equals:
            switches.append(f"--{name}")
            i += 1
            continue
        if not equals and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            value, i = argv[i + 1], i + 1
        found.append((name, value))
        i += 1
    return found, switches


def _field(c: ConfigDict, name: str, text: str | None) -> str:
    """The field that a flag means, by its dotted name or the last part of it."""
    if get(c, name) is not None or name in leaves(c):
        return name
    if name.startswith("no") and name[2:] in leaves(c):
        raise InputError(f"--{name}", "a truth value", f"--{name[2:]}=false")
    ends = [field for field in leaves(c) if field.endswith(f".{name}")]
    if len(ends) > 1:
        options = ", ".join(f"--{field}" for field in ends)
        likely = (takers(ends, text) or ends)[0]
        raise InputError(f"--{name}: several fields end so", f"one of {options}", f"--{likely}={text or '...'}")
    if ends:
        return ends[0]
    flags = [*_FLAGS, "reward", *_SWITCHES]
    turned = [flag for flag in flags if sorted(flag) == sorted(name)]  # letters in another order: --daat
    own = turned or difflib.get_close_matches(name, flags, n=1, cutoff=0.8)
    if own:
        raise InputError(f"--{name}: there is no such flag", "one of this command's, or a field", f"--{own[0]}")
    raise no_field(c, name, f"--{name}: there is no such field", "true" if text is None else text)


def _reward_field(c: ConfigDict, name: str) -> str:
    """A reward is a model, or "module:function" or "file.py:function"."""
    if "rewards" not in c:
        raise InputError(f"--reward with {c.algorithm.name}", "a reward with ppo alone", "without --reward")
    return "rewards.function" if ":" in name and not is_url(name) and not Path(name).is_dir() else "rewards.model"


def _check(name: str, c: ConfigDict, command: str) -> None:
    """Checks that the required flags were given."""
    data = f"{ALGORITHMS[name].reads.forms[0]}s.jsonl"
    flags = {"--model DIR": bool(c.model.path), f"--data {data}": bool(c.data.sources)}
    if "rewards" in c:
        flags["--reward DIR_OR_FILE.py:FUNCTION"] = bool(c.rewards.model or c.rewards.function)
    missing = [flag for flag, there in flags.items() if not there]
    if missing:
        names = " and no ".join(flag.split()[0] for flag in missing)
        raise InputError(
            f"{command} {name}: no {names}",
            "a model's directory or hub id, data" + (", and a reward" if "rewards" in c else ""),
            f"jaxalign {command} {name} {' '.join(flags if command == 'train' else missing)}",
        )


def no_algorithm(name: str, config: bool = False, command: str = "train") -> InputError:
    """The error for an unknown algorithm."""
    near = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.0)[0]
    more = ""
    if loss := PAIR_LOSSES.get(name):  # such as simpo
        near, more = "dpo", f" --loss={name}" + " --reference=none" * (loss.reference is False)
    rest = {"train": " --model DIR --data FILE", "plan": " --model DIR"}.get(command, "")
    return InputError(
        f"argument {name!r}" + (" beside --config" if config else ""),
        f"an algorithm, one of {', '.join(ALGORITHMS)}" + (", or --config=FILE" if rest else ""),
        "without it" if config else f"jaxalign {command} {near}{rest}{more}",
    )

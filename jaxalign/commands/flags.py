"""The flags of the commands: how they are declared, and those that several commands share."""

from __future__ import annotations

import argparse
import difflib
import json
from typing import Any

from jaxalign.errors import InputError
from jaxalign.ranges import check_flags

REQUIRED = object()


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are InputErrors."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]  # of `parse_args` too
        self._given = list(args or ())
        found, rest = super().parse_known_args(args, namespace)
        return _checked(found), rest

    def error(self, message: str):
        usage = " ".join(self.format_usage().removeprefix("usage: ").split())
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        for name in (arg[2:].partition("=")[0] for arg in self._given if arg.startswith("--")):
            if name in known:
                continue
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.7)
            fix = f"--{near[0]}" if near else f"{self.prog} --help"
            raise InputError(f"--{name}: there is no such flag", usage, fix)
        raise InputError(message, usage, f"{self.prog} --help")


def _checked(found: argparse.Namespace) -> argparse.Namespace:
    """Refuses blank values, and numbers out of their bounds."""
    for flag, value in vars(found).items():
        if isinstance(value, str) and not value.strip() and flag != "prompt":  # a shell variable that is not set
            raise InputError(f"--{flag} is {value!r}", "a value, or the flag left out", f"--{flag}=...")
    check_flags(**vars(found))
    return found


def parser(name: str, text: str, *flags: tuple[str, type, Any, str]) -> Parser:
    """A command's flags: (name, type, default or REQUIRED, what it is)."""
    made = Parser(
        prog=f"jaxalign {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, kind, default, help_text in flags:
        if kind is bool:
            made.add_argument(flag, action="store_true", help=help_text)
        else:
            shown = flag.lstrip("-").upper() if kind is str else "N" if kind is int else "X"
            if default is not None and default is not REQUIRED:
                help_text += f"; default {default}"
            required = default is REQUIRED
            made.add_argument(
                flag, type=kind, metavar=shown, required=required, default=None if required else default, help=help_text
            )
    return made


MODEL = ("--model", str, REQUIRED, "directory in Hugging Face form, or a hub id")
LINES = ("--data", str, REQUIRED, 'JSON lines, each with strings "prompt" and "completion"')
SEPARATE = ("--separate", bool, None, "tokenise prompt and completion apart; default: as one text, as in training")
DTYPE = ("--dtype", str, None, "of weights and computation: float32 (default), bfloat16, float16")
TEMPLATE = (
    "--chat_template_kwargs",
    str,
    None,
    "values of names that the chat template reads, as JSON: '{\"enable_thinking\": false}'; an export has its run's",
)


def template_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The values that `TEMPLATE` gives."""
    from jaxalign.relations import template_kwargs

    flag, text = TEMPLATE[0], args.chat_template_kwargs
    try:
        given = (json.loads(text),) if text else ()
    except ValueError as error:
        raise InputError(f"{flag} {text!r}", f"JSON ({error})", f"{flag} '{{\"enable_thinking\": false}}'") from error
    return template_kwargs(given, flag)


def sampling_flags(*, within_room: bool = False) -> tuple[tuple[str, type, Any, str], ...]:
    """How to sample; the defaults are the configuration's, `within_room` no longer than the model has room for."""
    from jaxalign.config import defaults

    c = defaults("ppo")
    most = c.rollout.max_new_tokens
    longest = (None, f"most tokens of a completion; default: {most}, or what the model has room for")
    return (
        ("--temperature", float, c.rollout.temperature, "0 always takes the likeliest token"),
        ("--max_new_tokens", int, *(longest if within_room else (most, "most tokens of a completion"))),
        ("--top_k", int, c.rollout.top_k, "samples among the k likeliest tokens; 0: off"),
        ("--top_p", float, c.rollout.top_p, "samples among the likeliest tokens that make up this share; 1: off"),
        ("--seed", int, c.seed, "of the samples"),
    )


def sampling(args: argparse.Namespace) -> Any:
    """The flags of `sampling_flags`, but for the seed, as `jaxalign.rollout.sampling.Sampling`."""
    from jaxalign.config import defaults
    from jaxalign.rollout.sampling import FIELDS, Sampling

    return Sampling.of(defaults("ppo").rollout, **{name: getattr(args, name) for name in FIELDS})

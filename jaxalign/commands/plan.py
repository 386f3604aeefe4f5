"""`jaxalign plan`: what a configuration needs of a machine that one does not have, and how fast it would be."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS

PLAN_HELP = """\
jaxalign plan --config=FILE --on=MACHINE [--config.FIELD=VALUE ...]
jaxalign plan ALGORITHM --model DIR_OR_HUB_ID --on=MACHINE [--data FILE] [--FIELD=VALUE ...]

Compiles every program that the stages of a config run, for a machine that need not be there, and says what it needs of
each device's memory, what it computes, moves and waits for, and how long it would take. Needs the extra plan of
jaxalign; reads config.json, the tokenizer and data that are files here, no weights. See docs/planning.md.

  --on=MACHINE             gpu:KIND:SLICESxHOSTSxGPUS  gpu:h200:1x8x1 (a node of eight), gpu:h100:2x1x8 (two nodes)
                           tpu:KIND:SHAPE[:SLICES]     tpu:v5p:2x2x2 (8 chips, v5p-16), tpu:v6e:2x4, tpu:v5e:4x4:2
                           several with commas between: planned in turn, ranked at the end
  --details                memory, time, traffic and collectives of every program; all that is assumed
  --json=FILE              all of it as JSON
  --assume NAME=VALUE      changes a number that the prediction assumes; the page lists them. Repeat it for several
                           price=2 (of one device for an hour), steps=5000 (of a run whose data are not here);
                           h100.price=2 for the machines of one kind
  --machines=FILE          a TOML file that adds machines, or changes their numbers
  --search[=N]             meshes, rematerialisation, accumulation and batches that fit, ranked; compiles N (default 6)

All other flags are those of jaxalign train.
"""
_OWN = ("on", "json", "assume", "machines")
_FLAGS = (*_OWN, "search", "details")
_NUMBERS = ("pool", "price", "steps")  # of --assume, often written as flags


def plan(argv: list[str]) -> int:
    """Plans what a config file says, or an algorithm by its name."""
    if not argv or {"-h", "--help"} & set(argv):
        print(PLAN_HELP, end="")
        return 0
    own, search, rest = _own_flags(argv)
    for flag in ("on", "json", "machines"):
        if len(own[flag]) > 1:
            fix = f"--{flag}={','.join(dict.fromkeys(own[flag])) if flag == 'on' else own[flag][0]}"
            raise InputError(f"--{flag} {len(own[flag])} times", "one", fix)
    if not own["on"]:
        raise InputError("no --on", "the machine to plan for", "--on=gpu:h200:1x8x1, or --on=tpu:v5p:2x2x2")
    # Nothing is computed here, and a compiler's plugin must not look for its devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if own["json"]:
        from jaxalign.disk import check_out

        check_out(own["json"][0], "--json")
    from jaxalign.commands.stop import at_once

    with tempfile.TemporaryDirectory(prefix="jaxalign-plan-") as scratch, at_once(scratch) as written:
        return _plan(_config(rest), own, search, written, named=bool(rest) and rest[0] in ALGORITHMS)


def _plan(config: Any, own: dict[str, list[str]], search: int, written: list[str], *, named: bool) -> int:
    from jaxalign.disk import write_whole
    from jaxalign.parallel.hardware import read_machines
    from jaxalign.plan.compare import compare, ranking_text, require_one, wanted
    from jaxalign.plan.plan import plan as planned
    from jaxalign.plan.plan import require_fit
    from jaxalign.plan.report import as_text

    machines = read_machines(own["machines"][0] if own["machines"] else None)
    asked = wanted(own["on"][0], own["assume"], machines)
    spelt = lambda text: text.replace("--config.", "--") if named else text  # noqa: E731  as the command's own flags
    say = lambda text: print(spelt(text), file=sys.stderr, flush=True)  # noqa: E731
    page = lambda found, assumed: spelt(as_text(found, assumed, details=bool(own["details"])))  # noqa: E731
    if len(asked) == 1:
        topology, assume = asked[0]
        found, assumed = planned(config, topology, machines=machines, assume=assume, search=search, say=say)
        print(page(found, assumed))
    else:
        show = lambda found, assumed: print(page(found, assumed), end="\n\n\n", flush=True)  # noqa: E731
        found = compare(config, machines, asked, search=search, say=say, show=show)
        print(spelt(ranking_text(found)))
    if own["json"]:
        write_whole(Path(own["json"][0]).expanduser(), json.dumps(found, indent=1) + "\n")
        written.append(own["json"][0])
    (require_fit if len(asked) == 1 else require_one)(found)
    return 0


def _own_flags(argv: list[str]) -> tuple[dict[str, list[str]], int, list[str]]:
    """This command's own flags, how many programs a search compiles (0: none), and the rest."""
    own: dict[str, list[str]] = {flag: [] for flag in (*_OWN, "details")}
    search, rest, i = 0, [], 0
    while i < len(argv):
        flag, equals, value = argv[i].partition("=")
        name = flag.removeprefix("--")
        if flag == "--search":
            if not equals and argv[i + 1 : i + 2] and argv[i + 1].isascii() and argv[i + 1].isdecimal():
                i += 1
                equals, value = "=", argv[i]
            if equals and not re.fullmatch("[1-9][0-9]{0,2}|1000", value):
                raise InputError(f"--search={value}", "how many programs to compile, at most", "--search=6")
            search = int(value) if equals else 6
        elif flag.startswith("--") and name in _OWN:
            if not equals:
                i += 1
                value = argv[i] if i < len(argv) else ""
            if not value.strip() or value.startswith("--"):
                raise InputError(f"--{name} without a value", "a value", f"--{name}=...")
            own[name].append(value)
        elif flag.startswith("--") and name in _NUMBERS:
            fix = f"--assume {name}={value or '...'}"
            raise InputError(f"{flag}: there is no such flag", "--assume NAME=VALUE", fix)
        elif flag == "--details":
            if equals:
                raise InputError(argv[i], "no value", "--details")
            own["details"].append("")
        elif flag in ("--dry_run", "--dry-run"):
            fix = f"leave out {flag}; jaxalign train ... --dry_run counts for the devices that are here"
            raise InputError(f"{flag}: a plan trains nothing", "jaxalign plan without it", fix)
        elif near := _meant(flag):
            known = ", ".join(f"--{each}" for each in _FLAGS)
            raise InputError(f"{flag}: there is no such flag", f"{known}, or one of training", f"{near}{equals}{value}")
        else:
            rest.append(argv[i])
        i += 1
    return own, search, rest


def _meant(flag: str) -> str:
    """This command's own flag that another is likely to mean; "" where that may be a field's."""
    if not flag.startswith("--") or "." in flag or flag in ("--config", "--model", "--data", "--out"):
        return ""
    near = difflib.get_close_matches(flag.removeprefix("--").lower(), _FLAGS, n=1, cutoff=0.75)
    return f"--{near[0]}" if near else ""


def _config(rest: list[str]) -> Any:
    """The configuration that the other flags stand for."""
    if rest and rest[0] in ALGORITHMS:
        from jaxalign.config import defaults
        from jaxalign.pipeline.named import named_config
        from jaxalign.plan.assumed import NO_DATA
        from jaxalign.plan.stages import NO_REWARD_MODEL

        fill: dict[str, Any] = {"data.sources": (NO_DATA,)}  # full rows are assumed
        if "rewards" in defaults(rest[0]) and not any(arg.startswith(("--reward", "--config.reward")) for arg in rest):
            fill["rewards.model"] = NO_REWARD_MODEL  # as large as the policy
        return named_config(rest[0], rest[1:], fill=fill, command="plan")[0]
    from jaxalign.pipeline.configfile import load_config, split_overrides
    from jaxalign.pipeline.named import no_algorithm

    own, overrides = split_overrides(rest)
    files = [arg.partition("=")[2] for arg in own if arg.startswith("--config=")]
    others = [arg for arg in own if not arg.startswith("--config=")]
    if others and not others[0].startswith("-") and not files:
        raise no_algorithm(others[0], command="plan")
    if len(files) == 1 and others and others[0].startswith("--"):
        from jaxalign.pipeline.mistakes import no_flag

        meant = no_flag(load_config(files[0], overrides), others, _FLAGS)
        if "--help" not in meant.fix:
            raise meant
    if others or len(files) != 1:
        raise InputError(
            f"argument {others[0]!r}" if others else f"{len(files)} config files",
            "--config=FILE, or an algorithm with a model",
            "jaxalign plan --config=configs/dpo.py --on=gpu:h200:1x8x1, or jaxalign plan --help",
        )
    return load_config(files[0], overrides)

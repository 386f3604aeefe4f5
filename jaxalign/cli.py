"""The command line: flags to calls, and nothing else."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxalign import __version__
from jaxalign.disk import cannot_write, trouble, write_whole
from jaxalign.errors import InputError
from jaxalign.ranges import check_flags

HELP = """\
jaxalign teaches a language model preferences, in JAX and Flax.

You bring a Hugging Face checkpoint (a directory or a hub id) and a file of examples; you get back a checkpoint that
transformers and vLLM load. The two roads, each a list of stages in a config file:

  SFT -> DPO                   from pairs of a better and a worse answer, in one step
  SFT -> reward model -> PPO   learn a reward from the pairs, then learn from it by trying

Start here
  jaxalign doctor                                      what this machine has, and whether it works
  jaxalign train --config=configs/dpo.py --dry_run     check data, rows and memory; train nothing
  jaxalign train --config=configs/dpo.py               train; the same command goes on after a stop

Change any field of a config from the command line, by its dotted name:
  jaxalign train --config=configs/dpo.py --config.workdir=runs/mine --config.model.path=DIR_OR_HUB_ID \\
                 --config.data.sources=pairs.jsonl --config.algorithm.beta=0.2

Commands
  train      run a config file: one stage, or several in order
  export     write a run's checkpoint as a Hugging Face directory
  generate   continue a prompt
  logprobs   log-probability of given completions
  score      a reward model's score of given completions, or DPO's implicit reward
  compare    two models side by side on held-out prompts: win rate, perplexity, diversity
  doctor     devices, versions, memory, missing extras

  jaxalign COMMAND --help      a command's own flags
  jaxalign --version

Data files are JSON lines: {"prompt": ..., "chosen": ..., "rejected": ...} for pairs, {"prompt": ..., "completion": ...}
for SFT. Results of a run: WORKDIR/export (the model), WORKDIR/metrics.jsonl, WORKDIR/data_report.json.
Exit status: 0 done, 1 something failed, 2 the input was wrong (the message says which line fixes it).
"""

TRAIN_HELP = """\
jaxalign train --config=FILE [--config.FIELD=VALUE ...] [--dry_run]

  --config=FILE            a Python file with get_config(); FILE:ARGUMENT calls get_config(ARGUMENT)
  --config.FIELD=VALUE     changes one field, by its dotted name; a name that does not exist is an error
                             --config.optimizer.learning_rate=5e-7     a number
                             --config.data.sources=a.jsonl,b.jsonl     several values; repeating the flag also adds
                             --config.data.sources='[{"path": "a.jsonl", "weight": 2}]'
                             --config.model.revision=None              empties a field that may be empty
  --dry_run                parses, reports the data, shows three rows decoded with their masks, estimates memory

A config with stages runs them in order into WORKDIR/STAGE. A stage that is done, with the same configuration and
inputs, is skipped; one that was stopped goes on; one that changed is run anew, with all that depends on it, and its
earlier result is kept as WORKDIR/STAGE.old-N.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; default: those of the process.

    Returns:
      The exit status: 0, 1 for something that failed, 2 for input that cannot be used.
    """
    program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "-help", "--helpshort", "--helpfull", "help"):
        print(HELP, end="")
        return 0
    if argv[0] in ("--version", "-V", "version"):
        print(f"jaxalign {__version__}")
        return 0
    if argv[0] != "train":
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here
    try:
        return _COMMANDS[argv[0]](argv[1:]) if argv[0] in _COMMANDS else _unknown(argv[0])
    except InputError as error:
        print(f"jaxalign {argv[0]}: the input cannot be used\n{error.render(_flags_of(argv[0]))}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # a help page (0), or training that was asked to stop and saved (128 + the signal)
        if stop.code in (0, None) and not {"-h", "--help"} & set(argv):
            # A reward function or a dependency: whatever ended the program, the command is not done.
            print(f"jaxalign {argv[0]}: something called sys.exit() before the end", file=sys.stderr)
            return 1
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        return _interrupted(program)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _came_of_interrupt(error):
            return _interrupted(program)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"jaxalign {argv[0]}: the input cannot be used\n{_too_long(argv, error)}", file=sys.stderr)
            return 2
        if (words := trouble(error)) is None:
            raise
        place = getattr(error, "filename", None) or f"a file of jaxalign {argv[0]}"
        print(f"jaxalign {argv[0]}: cannot go on\n{cannot_write(place, words)}", file=sys.stderr)
        return 1


def _too_long(argv: Sequence[str], error: OSError) -> InputError:
    """What to say of a path that no file system takes; the flag that gave it is named, where it was one."""
    path = str(error.filename)
    given = (flag for flag, _, value in (arg.partition("=") for arg in argv) if value and value[:300] in path)
    return InputError(
        f"{next(given, 'a path')}: {path[:100]}... of {len(path):,} characters: {error.strerror}",
        "a path whose every name has at most 255 bytes",
        "a shorter one",
    )


def _came_of_interrupt(error: Exception) -> bool:
    interrupts = sys.modules.get("jaxalign.train.interrupts")
    return interrupts is not None and interrupts.at_once(error)


def _interrupted(program: bool) -> int:
    """The end after a Ctrl-C. Another one, while threads and devices are let go, ends the process on the spot."""
    if program:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    print("interrupted; a run goes on from its last checkpoint by the same command", file=sys.stderr)
    return 130


def _flags_of(command: str) -> Callable[[str], str]:
    """How a command's flags call the fields of a configuration."""
    own = (
        {}
        if command == "train"
        else {"model.path": "--model", "data.sources": "--data", "rewards.function": "--reward"}
    )
    return lambda field: own.get(field, f"--config.{field}")


def _unknown(name: str) -> int:
    near = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.0)[0]
    raise InputError(f"command {name!r}", f"one of {', '.join(_COMMANDS)}", f"jaxalign {near}")


def _train(argv: list[str]) -> int:
    from absl import flags

    from jaxalign.pipeline.configfile import load_config, split_overrides
    from jaxalign.pipeline.mistakes import no_flag

    own, overrides = split_overrides(argv)
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "config file", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "check without training", flag_values=values)
    flags.DEFINE_bool("help", False, "this page", short_name="h", flag_values=values)
    try:
        rest = values(["train", *own], known_only=True)[1:]
    except flags.Error as error:
        raise InputError(str(error), "--config=FILE --config.FIELD=VALUE --dry_run", "jaxalign train --help") from None
    if values.help:
        print(TRAIN_HELP, end="")
        return 0
    if rest and values.config and (rest[0].startswith("-") or "=" in rest[0]):
        raise no_flag(load_config(values.config), rest, [name for name in values if len(name) > 1])
    if rest:
        file = "FILE" if rest[0].startswith("-") else rest[0]
        raise InputError(f"argument {rest[0]!r}", "flags: --name=value", f"jaxalign train --config={file}")
    if not values.config:
        raise InputError("no --config", "a config file", "jaxalign train --config=configs/dpo.py")

    config = load_config(values.config, overrides)
    from jaxalign.pipeline import stages
    from jaxalign.pipeline.notes import first_told

    warnings.showwarning = _show_warning
    with first_told(values.config):
        stages.run(config, dry_run=values.dry_run)
    return 0


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
    """A warning as a line for the user, without the place in the code that gave it."""
    del category, place, named
    print(f"warning: {message}", file=sys.stderr)


_REQUIRED = object()


class _Parser(argparse.ArgumentParser):
    """Wrong flags are wrong input, in the same three lines as any other."""

    def parse_args(self, *args, **named):  # type: ignore[override]
        found = super().parse_args(*args, **named)
        for flag, value in vars(found).items():
            if isinstance(value, str) and not value.strip() and flag != "prompt":  # a shell's variable, not set
                raise InputError(f"--{flag} is {value!r}", "a value, or the flag left out", f"--{flag}=...")
        check_flags(**vars(found))
        return found

    def error(self, message: str):
        raise InputError(message, " ".join(self.format_usage().removeprefix("usage: ").split()), f"{self.prog} --help")


def _parser(name: str, text: str, *flags: tuple[str, type, Any, str]) -> _Parser:
    """A command's flags: (name, type, default or REQUIRED, what it is)."""
    parser = _Parser(
        prog=f"jaxalign {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, kind, default, help_text in flags:
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        else:
            shown = flag.lstrip("-").upper() if kind is str else "N" if kind is int else "X"
            if default is not None and default is not _REQUIRED:
                help_text += f"; default {default}"
            required = default is _REQUIRED
            parser.add_argument(
                flag, type=kind, metavar=shown, required=required, default=None if required else default, help=help_text
            )
    return parser


_MODEL = ("--model", str, _REQUIRED, "directory in Hugging Face form, or a hub id")
_LINES = ("--data", str, _REQUIRED, 'JSON lines, each with strings "prompt" and "completion"')
_SEPARATE = ("--separate", bool, None, "tokenise prompt and completion apart; default: as one text, as in training")
_DTYPE = ("--dtype", str, None, "of weights and computation: float32 (default), bfloat16, float16")


def _sampling_flags(*, within_room: bool = False) -> tuple[tuple[str, type, Any, str], ...]:
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


_SAMPLING_NAMES = ("temperature", "max_new_tokens", "top_k", "top_p", "seed")


def _export(argv: list[str]) -> int:
    parser = _parser(
        "export",
        "Writes a run's model as a Hugging Face directory, from one of its checkpoints.",
        ("--workdir", str, _REQUIRED, "a run's directory, or that of a run with stages"),
        ("--out", str, _REQUIRED, "where to write: a new or empty directory, or an earlier export"),
        ("--stage", str, None, "which stage, where workdir holds several"),
        ("--checkpoint", str, "last", "last, best, or a number"),
        ("--dtype", str, None, "of the weights in the file; default: as they were trained"),
    )
    args = parser.parse_args(argv)
    from jaxalign.pipeline.export import export

    where = export(args.workdir, args.out, stage=args.stage, checkpoint=args.checkpoint, dtype=args.dtype)
    print(where)
    return 0


def _generate(argv: list[str]) -> int:
    parser = _parser(
        "generate",
        "Continues a prompt and prints the completion, nothing else.",
        _MODEL,
        ("--prompt", str, _REQUIRED, "the text to continue, as it stands"),
        *_sampling_flags(within_room=True),
        (
            "--chat",
            bool,
            None,
            "the prompt is a user's message: put into the model's chat template, if it has one",
        ),
        _DTYPE,
    )
    args = parser.parse_args(argv)
    from jaxalign.pipeline.generate import generate

    print(generate(args.model, args.prompt, chat=args.chat, dtype=args.dtype, **_sampling(args)))
    return 0


def _logprobs(argv: list[str]) -> int:
    parser = _parser(
        "logprobs",
        'Prints {"sum_logprob": nats, "num_tokens": n} for each line, in order: the completion given the prompt.\n'
        "Both are tokenised as one text, as in training; EOS counts only where the completion holds it.",
        _MODEL,
        _LINES,
        _SEPARATE,
        _DTYPE,
    )
    args = parser.parse_args(argv)
    from jaxalign.pipeline.logprobs import logprobs

    logprobs(args.model, args.data, separate=args.separate, dtype=args.dtype)
    return 0


def _score(argv: list[str]) -> int:
    parser = _parser(
        "score",
        'Prints {"score": x} for each line, in order: a reward model\'s score at the last token of prompt and\n'
        "completion, or, with --ref and --beta, DPO's implicit reward beta (log p_model - log p_ref).",
        _MODEL,
        _LINES,
        ("--ref", str, None, "reference policy: what the model was before DPO"),
        ("--beta", float, None, "of the DPO run"),
        ("--append_eos", bool, None, "end each completion by EOS, as in training; default: as it stands"),
        _SEPARATE,
        _DTYPE,
    )
    args = parser.parse_args(argv)
    from jaxalign.pipeline.score import score

    score(
        args.model,
        args.data,
        ref=args.ref,
        beta=args.beta,
        append_eos=args.append_eos,
        separate=args.separate,
        dtype=args.dtype,
    )
    return 0


def _compare(argv: list[str]) -> int:
    parser = _parser(
        "compare",
        "Two models side by side on held-out prompts: samples, win rate under a reward with its interval, perplexity\n"
        "of the completions in the data, diversity.",
        ("--base", str, _REQUIRED, "the model before: directory or hub id"),
        ("--aligned", str, _REQUIRED, "the model after"),
        ("--data", str, _REQUIRED, "held-out records in any format that training reads"),
        ("--reward", str, None, "a reward model's directory, module:function or FILE.py:function"),
        ("--num_prompts", int, None, "how many of the data's prompts; default: all"),
        ("--show", int, 5, "how many samples to show"),
        ("--confidence", float, 0.95, "of the win rate's interval"),
        *_sampling_flags(),
        ("--out", str, None, "a file for all of it as JSON"),
        ("--json", bool, None, "print the JSON instead of the page"),
        _DTYPE,
    )
    args = parser.parse_args(argv)
    from jaxalign.pipeline.compare import check_out, compare, page

    if args.out:
        check_out(args.out)  # before the models answer, which takes long
    result = compare(
        args.base,
        args.aligned,
        args.data,
        reward=args.reward,
        num_prompts=args.num_prompts,
        confidence=args.confidence,
        dtype=args.dtype,
        **_sampling(args),
    )
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if args.out:
        try:
            write_whole(Path(args.out).expanduser(), text + "\n")
        except InputError:
            print(text)  # minutes of work: not lost
            raise
    width = min(120, shutil.get_terminal_size((120, 0)).columns)
    print(text if args.json else page(result, show=args.show, width=width))
    return 0


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _SAMPLING_NAMES}


def _doctor(argv: list[str]) -> int:
    _parser("doctor", "Prints devices, versions, memory and missing extras, and tries a small step.").parse_args(argv)
    from jaxalign.pipeline.doctor import doctor

    return doctor()


_COMMANDS = {
    "train": _train,
    "export": _export,
    "generate": _generate,
    "logprobs": _logprobs,
    "score": _score,
    "compare": _compare,
    "doctor": _doctor,
}

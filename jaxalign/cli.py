"""The command line: finds the command, and turns exceptions into messages and exit codes."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from jaxalign import __version__
from jaxalign.disk import cannot_write, trouble
from jaxalign.errors import InputError

HELP = """\
jaxalign teaches a language model preferences, in JAX and Flax.

You bring a Hugging Face checkpoint (a directory or a hub id) and a file of examples; you get back a checkpoint that
transformers and vLLM load. The two roads:

  SFT -> DPO                   from pairs of a better and a worse answer, in one step
  SFT -> reward model -> PPO   learn a reward from the pairs, then learn from it by trying

Start here
  jaxalign doctor                                                  what this machine has, and whether it works
  jaxalign train dpo --model DIR --data pairs.jsonl --dry_run      check data, rows and memory; train nothing
  jaxalign train dpo --model DIR --data pairs.jsonl --out runs/x   train; the same command resumes after a stop

Change any field by its dotted name; a config file holds several stages, or what is to be kept:
  jaxalign train dpo --model DIR --data pairs.jsonl --algorithm.beta=0.2 --optimizer.learning_rate=5e-7
  jaxalign train --config=configs/dpo.py --config.workdir=runs/mine --config.model.path=DIR_OR_HUB_ID

Commands
  train      train: sft, reward, dpo or ppo by name, or a config file with one stage or several in order
  plan       what a config needs of a machine that one does not have, and how fast it would be
  config     the fields of an algorithm with their defaults; a config file to start from
  export     write a run's checkpoint as a Hugging Face directory
  generate   continue a prompt
  chat       a dialogue with a model, line by line
  logprobs   log-probability of given completions
  score      a reward model's score of given completions, or DPO's implicit reward
  evaluate   accuracy, margins, calibration, loss, perplexity of a model or a reward model on held-out data
  compare    two models side by side on held-out prompts: win rate, perplexity, diversity
  doctor     devices, versions, memory, missing extras

  jaxalign COMMAND --help      a command's own flags
  jaxalign --version

Data files are JSON lines: {"prompt": ..., "chosen": ..., "rejected": ...} for pairs, {"prompt": ..., "completion": ...}
for SFT. Results of a run: WORKDIR/export (the model), WORKDIR/metrics.jsonl, WORKDIR/data_report.json.
Exit status: 0 done, 1 something failed, 2 the input was wrong (the message says which line fixes it).
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
        logging.getLogger("absl").setLevel(logging.ERROR)  # hides Orbax's warnings
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is absent on purpose
    try:
        return _command(argv[0])(argv[1:])
    except InputError as error:
        print(f"jaxalign {argv[0]}: the input cannot be used\n{_rendered(error, argv)}", file=sys.stderr)
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
        print(f"jaxalign {argv[0]}: cannot continue\n{cannot_write(place, words)}", file=sys.stderr)
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
    print("interrupted; the same command resumes a run from its last checkpoint", file=sys.stderr)
    return 130


def _rendered(error: InputError, argv: Sequence[str]) -> str:
    """An error in the terms of a command: with a config file, or of flags alone."""
    file = argv[0] in ("train", "plan") and (len(argv) == 1 or argv[1].startswith("-"))
    return error.render() if file else error.render(_flags_of(argv), file=False)


def _flags_of(argv: Sequence[str]) -> Callable[[str], str]:
    """How a command's flags call the fields of a configuration, where it takes no config file."""
    own = {"model.path": "--model", "data.sources": "--data", "rewards.function": "--reward"}
    if argv[0] not in ("train", "plan", "config", "evaluate"):
        return lambda field: own.get(field, f"--config.{field}")
    own |= {"rewards.model": "--reward", "data.eval_sources": "--eval_data", "workdir": "--out"}
    own |= {"algorithm.reference_path": "--reference"} if argv[0] == "evaluate" else {}
    return lambda field: own.get(field, f"--{field}")


def _unknown(name: str) -> Callable[[list[str]], int]:
    near = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.0)[0]
    raise InputError(f"command {name!r}", f"one of {', '.join(_COMMANDS)}", f"jaxalign {near}")


def _command(name: str) -> Callable[[list[str]], int]:
    """The function of a command, whose module is imported now."""
    if name not in _COMMANDS:
        return _unknown(name)
    return getattr(importlib.import_module(f"jaxalign.commands.{_COMMANDS[name]}"), name)


_COMMANDS = {  # name: the module of `jaxalign.commands` that has a function of this name
    "train": "train",
    "plan": "plan",
    "config": "train",
    "export": "models",
    "generate": "models",
    "chat": "models",
    "logprobs": "models",
    "score": "models",
    "evaluate": "models",
    "compare": "models",
    "doctor": "models",
}


if __name__ == "__main__":  # python -m jaxalign.cli
    sys.exit(main())

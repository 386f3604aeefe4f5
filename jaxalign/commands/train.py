"""The commands train and config: a config file or an algorithm's name, and fields from the command line."""

from __future__ import annotations

import shlex
import sys
import warnings
from typing import Any

from jaxalign.config import validated
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS

TRAIN_HELP = """\
jaxalign train ALGORITHM --model DIR --data FILE [--out DIR] [--FIELD=VALUE ...] [--dry_run]
jaxalign train --config=FILE [--config.FIELD=VALUE ...] [--dry_run]

  ALGORITHM                sft, reward, dpo or ppo; prints the config file that the command stands for
  --model=DIR              what to start from: a directory in Hugging Face form, or a hub id
  --data=FILE              records to train on; repeat it, or use commas, for several
  --eval_data=FILE         held-out records; or --eval_fraction=0.05 of the training data
  --reward=DIR             ppo: a reward model's directory or hub id, FILE.py:FUNCTION or module:function
  --out=DIR                the run's directory; default: runs/ALGORITHM
  --FIELD=VALUE            changes one field; its last part is enough where only one field ends so
                             --optimizer.learning_rate=5e-7, or --learning_rate=5e-7
                             --batch_size=8 --num_epochs=2 --max_length=512
                           jaxalign config ALGORITHM lists the fields

  --config=FILE            a Python file with get_config(), or YAML or JSON with the same fields;
                           FILE.py:ARGUMENT calls get_config(ARGUMENT)
  --config.FIELD=VALUE     changes one field, by its dotted name; a name that does not exist is an error
                             --config.optimizer.learning_rate=5e-7     a number
                             --config.data.sources=a.jsonl,b.jsonl     several values; repeating the flag also adds
                             --config.data.sources='[{"path": "a.jsonl", "weight": 2}]'
                             --config.model.revision=None              empties a field that may be empty
  --dry_run                parses, reports the data, shows three rows decoded with their masks, estimates memory

A config with stages runs them in order into WORKDIR/STAGE. A stage that is done, with the same configuration and
inputs, is skipped; one that was stopped is resumed; one that changed is run anew, with all that depends on it, and its
earlier result is kept as WORKDIR/STAGE.old-N.
"""


def train(argv: list[str]) -> int:
    """Trains what a config file says, or an algorithm by its name."""
    if argv and argv[0] in ALGORITHMS:
        return _train_named(argv)
    from absl import flags

    from jaxalign.pipeline.configfile import load_config, split_overrides
    from jaxalign.pipeline.mistakes import no_flag
    from jaxalign.pipeline.named import no_algorithm

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
    if rest and not rest[0].startswith("-") and not rest[0].endswith((".py", ".yaml", ".yml", ".json")):
        raise no_algorithm(rest[0], bool(values.config))
    if rest and rest[0].partition("=")[0] in ("--model", "--data", "--out"):  # flags of a named algorithm
        raise InputError(
            f"{rest[0]} and no algorithm",
            f"one of {', '.join(ALGORITHMS)} before the flags",
            f"jaxalign train dpo {shlex.join(argv)}",
        )
    if rest:
        file = "FILE" if rest[0].startswith("-") else rest[0]
        raise InputError(f"argument {rest[0]!r}", "flags: --name=value", f"jaxalign train --config={file}")
    if not values.config:
        raise InputError(
            "no --config and no algorithm",
            "a config file, or an algorithm with a model and data",
            "jaxalign train dpo --model DIR --data pairs.jsonl, or jaxalign train --config=configs/dpo.py",
        )

    config = load_config(values.config, overrides)
    from jaxalign.pipeline.notes import first_told

    with first_told(values.config):
        _run(config, values.dry_run)
    return 0


def _train_named(argv: list[str]) -> int:
    """An algorithm by its name: the config that the flags stand for is printed and run."""
    from jaxalign.pipeline.configtext import as_python
    from jaxalign.pipeline.named import named_config

    if {"-h", "--help"} & set(argv):
        print(TRAIN_HELP, end="")
        return 0
    config, switches = named_config(argv[0], argv[1:])
    checked = validated(config)  # before it is printed
    print("# This command as a file, for jaxalign train --config=FILE.py:", as_python(config), sep="\n", flush=True)
    _run(checked, "--dry_run" in switches)
    return 0


def _run(config: Any, dry_run: bool) -> None:
    from jaxalign.pipeline import stages

    warnings.showwarning = _show_warning
    stages.run(config, dry_run=dry_run)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
    """A warning as a line for the user, without the place in the code that gave it."""
    del category, place, named
    print(f"warning: {message}", file=sys.stderr)


CONFIG_HELP = """\
jaxalign config ALGORITHM [--as=py|yaml|json] [--model DIR --data FILE ... --FIELD=VALUE]

Lists every field of sft, reward, dpo or ppo: its default, what it may be, what it does. With --as, prints a config file
instead, for jaxalign train --config=FILE: what the flags say, which are those of jaxalign train ALGORITHM.

  jaxalign config dpo
  jaxalign config dpo --as=yaml --model DIR --data pairs.jsonl --beta=0.2 > dpo.yaml
"""


def config(argv: list[str]) -> int:
    """Lists an algorithm's fields, or prints a config file."""
    from jaxalign.pipeline.configtext import FORMS, PLACEHOLDERS, written
    from jaxalign.pipeline.fields import page
    from jaxalign.pipeline.named import named_config, no_algorithm

    if not argv or {"-h", "--help"} & set(argv):
        print(CONFIG_HELP, end="")
        return 0
    if argv[0] not in ALGORITHMS:
        raise no_algorithm(argv[0], command="config")
    form, rest = None, []
    for i, arg in enumerate(argv[1:], 1):
        if arg == "--as" or argv[i - 1] == "--as":
            form = "" if arg == "--as" else arg
        elif arg.startswith("--as="):
            form = arg.partition("=")[2]
        else:
            rest.append(arg)
    if form is None and rest:
        raise InputError(
            f"argument {rest[0]!r}",
            "--as=py, yaml or json beside it",
            f"jaxalign {' '.join(['config', *argv])} --as=py",
        )
    if form is None:
        print(page(argv[0]))
        return 0
    if form not in FORMS:
        raise InputError(f"--as={form}", f"one of {', '.join(FORMS)}", f"jaxalign config {argv[0]} --as={FORMS[0]}")
    given, _ = named_config(argv[0], rest, fill=PLACEHOLDERS)
    print(written(given, form), end="")
    return 0

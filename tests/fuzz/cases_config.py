"""Fields of a configuration: numbers, choices, truth values, tuples at values that mean nothing; misspelt names."""

from __future__ import annotations

import random
import re
import string

from jaxalign.config import defaults, get, leaves
from jaxalign.ranges import CHOICES
from tests.fuzz.case import REFUSED, RUNS, SOUND, Case
from tests.fuzz.world import ALGORITHMS, train

# Fields at which 0 means nothing; at the others it switches something off, or is a number like any other.
_NOT_ZERO = (
    "batch_size", "grad_accum_steps", "num_train_steps", "num_epochs",
    "data.max_records", "data.max_length", "data.max_prompt_length", "data.max_completion_length",
    "data.row_length", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "logging.every", "logging.num_samples", "eval.num_batches", "checkpoint.keep",
    "algorithm.beta", "algorithm.kl_target", "algorithm.kl_horizon", "algorithm.clip_range",
    "algorithm.value_clip_range", "algorithm.num_ppo_epochs", "algorithm.num_minibatches", "algorithm.max_approx_kl",
    "rollout.max_new_tokens", "rollout.num_samples", "rollout.top_p", "rewards.clip",
)  # fmt: skip
# Fields at which -1 has a meaning.
_MAY_BE_NEGATIVE = ("mesh.", "rewards.scale", "rewards.missing_eos_penalty")
# Whole numbers whose greatness does no harm, or is seen only in what the run would then do.
_MAY_BE_HUGE = ("data.max_records", "checkpoint.every", "checkpoint.keep", "logging.", "eval.", "profile")

_NONSENSE = {  # name: (as a flag's text, as Python)
    "nan": ("nan", 'float("nan")'),
    "inf": ("inf", 'float("inf")'),
    "minus-inf": ("-inf", '-float("inf")'),
    "true": ("True", "True"),
    "text": ("text", '"text"'),
    "empty": ("", '""'),
    "list": ("[1]", "[1]"),
}


def cases(rng: random.Random) -> list[Case]:
    """The cases of the groups `config` and `names`."""
    return [*_numbers(rng), *_choices(rng), *_truths(rng), *_tuples(rng), *_texts(rng), *_names(rng)]


def fields(kinds: tuple[type, ...]) -> dict[str, list[str]]:
    """Dotted names of the fields of some types, and the algorithms that have them."""
    found: dict[str, list[str]] = {}
    for algorithm in ALGORITHMS:
        tree = defaults(algorithm)
        for field in leaves(tree):
            *parents, name = field.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            if node.get_type(name) in kinds:
                found.setdefault(field, []).append(algorithm)
    return found


def _case(
    rng: random.Random, field: str, algorithms: list[str], name: str, value: tuple[str, str], expect: str, **options
) -> Case:
    """A field at a value, by a flag or in the file, whichever the seed says."""
    algorithm, flag = rng.choice(algorithms), rng.random() < 0.5
    channel, dry = "flag" if flag else "file", options.pop("dry", False)
    *parents, leaf = field.split(".")
    line = "c" + "".join(f'["{part}"]' for part in (*parents, leaf)) + f" = {value[1]}"

    def make(place):
        if flag:
            return train(place, algorithm, flags=(f"--config.{field}={value[0]}",), dry=dry)
        return train(place, algorithm, line, dry=dry)

    words = (leaf,) if expect == REFUSED else ()
    return Case("config", f"{field}={name}-{channel}", make, expect, options.pop("words", words), **options)


def _numbers(rng):
    for kind in (int, float):
        for field, algorithms in fields((kind,)).items():
            leaf = field.rsplit(".", 1)[-1]
            for name, value in _NONSENSE.items():
                cast = kind is float and name == "true"  # ml_collections makes it 1.0 before anybody looks
                yield _case(rng, field, algorithms, name, value, SOUND if cast else REFUSED)
            negative = SOUND if field.startswith(_MAY_BE_NEGATIVE) else REFUSED
            yield _case(rng, field, algorithms, "minus-1", ("-1", "-1"), negative)
            yield _case(rng, field, algorithms, "0", ("0", "0"), REFUSED if field in _NOT_ZERO else SOUND)
            empty = defaults(algorithms[0])
            for part in field.split("."):
                empty = empty[part]
            yield _case(rng, field, algorithms, "none", ("None", "None"), SOUND if empty is None else REFUSED)
            if kind is int:
                huge = SOUND if field.startswith(_MAY_BE_HUGE) else REFUSED
                yield _case(rng, field, algorithms, "huge", ("1e30", "10**30"), huge)
                yield _case(rng, field, algorithms, "large", ("10000000000", "10**10"), SOUND, dry=True)
                yield _case(rng, field, algorithms, "part", ("2.5", "2.5"), REFUSED)
            else:  # float32 does not hold these
                yield _case(rng, field, algorithms, "huge", ("1e300", "1e300"), REFUSED)
                digits = ("1" + "0" * 400, "10**400")
                yield _case(rng, field, algorithms, "digits", digits, REFUSED, words=(f"{leaf}|config.py",))


def _choices(rng):
    for field, allowed in CHOICES:
        algorithms = [a for a in ALGORITHMS if field in set(leaves(defaults(a)))]
        values = [("nonsense", "nonsense"), ("upper", str(allowed[-1]).upper()), ("list", "a,b"), ("empty", "")]
        for name, text in values:
            yield _case(rng, field, algorithms, name, (text, repr(text)), REFUSED)
        yield _case(rng, field, algorithms, "number", ("3", "3"), REFUSED)
        yield _case(rng, field, algorithms, "none", ("None", "None"), SOUND if None in allowed else REFUSED)


def _truths(rng):
    for field, algorithms in fields((bool,)).items():
        for name, value in {"maybe": ("maybe", '"maybe"'), "two": ("2", "2"), "none": ("None", "None")}.items():
            may_be_empty = name == "none" and get(defaults(algorithms[0]), field) is None
            yield _case(rng, field, algorithms, name, value, SOUND if may_be_empty else REFUSED)


_SOURCES = {
    "number": "3",
    "none": "None",
    "nothing": "()",
    "blank": '("",)',
    "number-inside": "(1,)",
    "none-inside": "(None,)",
    "nested": '(("a.jsonl",),)',
    "no-path": '({"weight": 2},)',
    "path-number": '({"path": 3},)',
    "misspelt": '({"pth": "a.jsonl"},)',
    "weight-nan": '({"path": GOOD, "weight": float("nan")},)',
    "weight-zero": '({"path": GOOD, "weight": 0},)',
    "weight-inf": '({"path": GOOD, "weight": float("inf")},)',
    "weight-huge": '({"path": GOOD, "weight": 1e300},)',
    "weight-tiny": '({"path": GOOD, "weight": 1e-300},)',
    "weight-text": '({"path": GOOD, "weight": "2"},)',
    "columns-list": '({"path": GOOD, "columns": ["prompt"]},)',
    "columns-unknown": '({"path": GOOD, "columns": {"prompt": "question"}},)',
    "columns-ours": '({"path": GOOD, "columns": {"prumpt": "prompt"}},)',
    "preset-unknown": '({"path": GOOD, "preset": "nonsense"},)',
    "split-of-file": '({"path": GOOD, "split": "test"},)',
    "name-of-file": '({"path": GOOD, "name": "x"},)',
    "revision-of-file": '({"path": GOOD, "revision": "x"},)',
    "lambda": "(lambda: 1,)",
}
_STOPS = {
    "part": "(1.5,)",
    "true": "(True,)",
    "negative": "(-1,)",
    "beyond": "(10**9,)",
    "huge": "(10**30,)",
    "blank": '("",)',
    "many-tokens": '("the whole of this sentence",)',
    "none": "(None,)",
    "nested": "((1,),)",
    "dict": '({"a": 1},)',
    "nan": '(float("nan"),)',
    "surrogate": r'("\ud83d",)',
}


def _tuples(rng):
    for field, values in (("data.sources", _SOURCES), ("data.eval_sources", _SOURCES)):
        for name, value in values.items():
            algorithm = rng.choice(ALGORITHMS)
            expect = REFUSED
            if field == "data.eval_sources" and name in ("nothing", "weight-nan", "weight-inf", "weight-huge"):
                expect = RUNS if name == "nothing" else REFUSED
            if name == "weight-tiny":
                expect = SOUND
            line = f"c.{field} = {value}"

            def make(place, algorithm=algorithm, line=line):
                return train(place, algorithm, "GOOD = c.data.sources[0]", line)

            yield Case("config", f"{field}={name}-{algorithm}", make, expect)
    for name, value in _STOPS.items():
        algorithm = rng.choice(("dpo", "ppo"))
        lines = ("c.logging.samples_every = 1", f"c.rollout.stop = {value}")

        def make(place, algorithm=algorithm, lines=lines):
            return train(place, algorithm, *lines)

        yield Case("config", f"rollout.stop={name}-{algorithm}", make, REFUSED, ("rollout.stop",))


def _texts(rng):
    """Texts that name something which is not there."""
    skipped = {field for field, _ in CHOICES} | {"algorithm.name"}
    for field, algorithms in fields((str,)).items():
        if field in skipped:
            continue
        for name, value in {
            "nowhere": ("/proc/nowhere/at/all", '"/proc/nowhere/at/all"'),
            "number": ("7", "7"),
            "nul": ("a\0b", r'"a\0b"'),
            "newline": ("a\nb", r'"a\nb"'),
            "long": ("x" * 1500, '"x" * 1500'),
        }.items():
            fine = {"workdir": ("nowhere", "number", "newline"), "data.cache_dir": ("nowhere", "number", "newline")}
            fine["logging.project"] = ("nowhere", "number", "newline", "long", "nul")
            fine["logging.run_name"] = ("nowhere", "number")
            fine["checkpoint.best_metric"] = fine["model.revision"] = ()
            expect = SOUND if name in fine.get(field, ()) else REFUSED
            yield _case(rng, field, algorithms, name, value, expect, words=(), dry=field == "workdir")
        for name, text in {"blank": "", "space": " "}.items():  # None empties a field that may be empty
            yield _case(rng, field, algorithms, name, (text, repr(text)), REFUSED, dry=True)


# What other libraries call a field: the name that ours has must be in the answer.
_ALIASES = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "optimizer.lr": "optimizer.learning_rate",
    "data.path": "data.sources",
    "data.dataset": "data.sources",
    "dataset_name": "data.sources",
    "model_name_or_path": "model.path",
    "model.name": "model.path",
    "output_dir": "workdir",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "num_train_epochs": "num_epochs",
    "max_steps": "num_train_steps",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.max_grad_norm",
    "lr_scheduler_type": "optimizer.schedule",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "logging_steps": "logging.every",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "gradient_checkpointing": "model.remat",
    "metric_for_best_model": "checkpoint.best_metric",
    "resume_from_checkpoint": "checkpoint.resume",
    "optim": "optimizer.name",
    "attn_implementation": "model.attention",
}
_ALIASES_OF = {
    "dpo": {"beta": "algorithm.beta", "loss_type": "algorithm.loss", "algorithm.betta": "algorithm.beta"},
    "ppo": {
        "kl_coef": "algorithm.kl_coef",
        "cliprange": "algorithm.clip_range",
        "lam": "algorithm.gae_lambda",
        "gamma": "algorithm.gamma",
        "response_length": "rollout.max_new_tokens",
        "reward_model_path": "rewards.model",
        "temperature": "rollout.temperature",
        "ppo_epochs": "algorithm.num_ppo_epochs",
        "num_mini_batches": "algorithm.num_minibatches",
    },
}


def _names(rng):
    for alias, ours in _ALIASES.items():
        yield _name(rng.choice(ALGORITHMS), alias, ours, rng)
    for algorithm, aliases in _ALIASES_OF.items():
        for alias, ours in aliases.items():
            yield _name(algorithm, alias, ours, rng)
    everywhere = fields((int, float, bool, str, tuple))
    for field, algorithms in everywhere.items():
        *parents, leaf = field.split(".")
        wrong = ".".join([*parents, _misspelt(leaf, rng)])
        if wrong not in everywhere and wrong not in _ALIASES:
            yield _name(rng.choice(algorithms), wrong, field if len(leaf) > 3 else "", rng)
        if parents:  # without its section, or in another one
            other = rng.choice([s for s in ("model", "data", "optimizer", "checkpoint") if s != parents[0]])
            wrong = rng.choice((leaf, f"{other}.{leaf}"))
            if wrong not in everywhere and wrong not in _ALIASES:
                same = [f for f in everywhere if f.rsplit(".", 1)[-1] == leaf]
                yield _name(rng.choice(algorithms), wrong, leaf if len(same) == 1 else "", rng)


def _name(algorithm: str, wrong: str, ours: str, rng: random.Random) -> Case:
    flag = rng.random() < 0.7
    line = "c" + "".join(f'["{part}"]' for part in wrong.split(".")) + " = 1"

    def make(place):
        if flag:
            return train(place, algorithm, flags=(f"--config.{wrong}=1",))
        return train(place, algorithm, line)

    number = rng.randrange(10**6)
    words = (re.sub(r"^.*?([\w.]+)$", r"\1", ours),) if ours else ()
    return Case("names", f"{algorithm}-{wrong}-{'flag' if flag else 'file'}-{number}", make, REFUSED, words)


def _misspelt(name: str, rng: random.Random) -> str:
    at = rng.randrange(len(name))
    letter = rng.choice(string.ascii_lowercase)
    kind = rng.randrange(4)
    if kind == 0 and len(name) > 2:
        return name[:at] + name[at + 1 :]
    if kind == 1:
        return name[:at] + name[at] + name[at:]
    if kind == 2 and at + 1 < len(name) and name[at] != name[at + 1]:
        return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    return name[: at + 1] + letter + name[at + 1 :]

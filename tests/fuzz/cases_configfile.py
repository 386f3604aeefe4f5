"""Config files that fail, leave, hang, or give something else than a configuration."""

from __future__ import annotations

import os
import random

from tests.fuzz.case import REFUSED, RUNS, SOUND, Case
from tests.fuzz.world import ALGORITHMS, config_text, train

_HEAD = "from jaxalign.config import defaults, stages\n"


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `configfile`."""
    return [*_whole_files(), *_lines(rng), *_sections(rng), *_stages(), *_paths()]


def _file(name, content, expect=REFUSED, words=(), flags=()):
    def make(place):
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (place.here / "config.py").write_bytes(data)
        return ["train", "--config=config.py", *flags]

    return Case("configfile", name, make, expect, words)


def _whole_files():
    get = "def get_config():\n    "
    yield _file("empty", "", words=("get_config",))
    yield _file("no-get-config", "x = 1\n", words=("get_config",))
    yield _file("syntax", "def get_config(:\n", words=("config.py:1",))
    yield _file("indentation", "def get_config():\nreturn 1\n", words=("config.py:2",))
    yield _file("nul-bytes", b"def get_config():\n    return \0\n")
    yield _file("binary", bytes(range(256)) * 4)
    yield _file("utf-16", "def get_config(): pass\n".encode("utf-16"))
    yield _file("latin-1", "# é\ndef get_config(): pass\n".encode("latin-1"))
    yield _file("surrogate", get + 'return "\ud83d"\n')
    yield _file("deep", "x = " + "(" * 5000 + ")" * 5000 + "\n")
    yield _file("number", "get_config = 3\n", words=("get_config",))
    yield _file("class", "class get_config:\n    pass\n")
    yield _file("coroutine", "async " + get + "return 1\n")
    yield _file("generator", get + "yield 1\n")
    yield _file("wants-two", "def get_config(a, b):\n    return 1\n")
    yield _file("import-missing", "import no_such_module\n" + get + "return 1\n", words=("no_such_module",))
    yield _file("import-error", "from jaxalign.config import nothing\n" + get + "return 1\n", words=("nothing",))
    yield _file("old-import", "from jaxalign.configs import x\n" + get + "return 1\n")
    for name, value in {
        "none": "None",
        "dict": '{"seed": 1}',
        "list": "[]",
        "text": '"dpo"',
        "number": "3",
        "nan": 'float("nan")',
        "type": "dict",
        "self": "get_config",
    }.items():
        yield _file(f"returns-{name}", f"{get}return {value}\n", words=("get_config",))
    tree = "from ml_collections import ConfigDict\n" + get
    yield _file("returns-empty-tree", tree + "return ConfigDict()\n")
    yield _file("returns-foreign-tree", tree + 'return ConfigDict({"algorithm": {"name": "dpo"}})\n')
    yield _file("returns-half-tree", tree + 'return ConfigDict({"algorithm": {"name": "dpo"}, "workdir": "out"})\n')
    yield _file("returns-algorithm-text", tree + 'return ConfigDict({"algorithm": "dpo"})\n')
    yield _file("returns-algorithm-none", tree + 'return ConfigDict({"algorithm": None})\n')
    for where, template in (("import", "{0}\n" + get + "return 1\n"), ("call", get + "{0}\n")):
        for name, line in {
            "value-error": 'raise ValueError("what went wrong")',
            "key-error": "raise KeyError",
            "empty-error": "raise Exception()",
            "assertion": "assert False",
            "division": "1 / 0",
            "index": "[][1]",
            "unicode-error": '"é".encode("ascii")',
            "attribute": "None.x",
            "name": "undefined_name",
            "recursion": "f = lambda: f(); f()",
            "stop-iteration": "next(iter(()))",
            "group": 'raise ExceptionGroup("many", [ValueError(1), TypeError(2)])',
            "exit-0": "import sys; sys.exit(0)",
            "exit-none": "import sys; sys.exit()",
            "exit-text": 'import sys; sys.exit("bye")',
            "exit-3": "import sys; sys.exit(3)",
            "quit": "raise SystemExit",
            "own-base": 'raise type("Own", (BaseException,), {})("mine")',
            "generator-exit": "raise GeneratorExit",
            "memory": "raise MemoryError",
            "os-error": 'open("/proc/nowhere/at/all")',
            "long-message": 'raise ValueError("x" * 100_000)',
            "many-lines": 'raise ValueError("\\n" * 1000)',
            "surrogate-message": 'raise ValueError("\\ud83d")',
            "no-text": 'raise type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})()',
            "nested": 'raise ValueError("a") from KeyError("b")',
        }.items():
            yield _file(f"{where}-{name}", template.format(line), words=("config.py",))


def _lines(rng):
    """Good files but for a line."""
    lines = {
        "del-section": ("del c.optimizer", REFUSED),
        "del-field": ("del c.optimizer.learning_rate", REFUSED),
        "new-section": ('c.unlock(); c.extra = {"a": 1}', REFUSED),
        "new-field": ("c.unlock(); c.optimizer.lr = 1e-3", REFUSED),
        "new-field-none": ("c.unlock(); c.modle = None", REFUSED),
        "unlocked": ("c.unlock()", RUNS),
        "number-of-numpy": ("import numpy as np; c.batch_size = np.int64(4)", SOUND),
        "float-of-numpy": ("import numpy as np; c.optimizer.learning_rate = np.float32(1e-4)", SOUND),
        "array": ("import numpy as np; c.batch_size = np.array([4, 4])", REFUSED),
        "nan-of-numpy": ('import numpy as np; c.optimizer.learning_rate = np.float32("nan")', REFUSED),
        "path-object": ('import pathlib; c.workdir = pathlib.Path("out")', SOUND),
        "bytes": ('c.model.path = b"abc"', REFUSED),
        "callable": ("c.optimizer.learning_rate = lambda: 1e-3", REFUSED),
        "reference": ("c.optimizer.learning_rate = c.optimizer.get_ref('weight_decay')", SOUND),
        "reference-endless": ("c.batch_size = c.get_ref('batch_size') + 1", SOUND),
        "set": ("c.data.sources = {1, 2}", REFUSED),
        "algorithm-other": ("c.unlock(); c.algorithm.name = 'ppo'", REFUSED),
        "algorithm-unknown": ("c.unlock(); c.algorithm.name = 'grpo'", REFUSED),
        "algorithm-none": ("c.unlock(); c.algorithm.name = None", REFUSED),
        "from-model": ("c['from'].model = 'sft'", REFUSED),
        "from-reward": ("c['from'].reward = 'reward'", REFUSED),
        "from-scratch-text": ("c.model.from_scratch = 'no'", REFUSED),
        "chdir": ("import os; os.makedirs('elsewhere'); os.chdir('elsewhere')", SOUND),
        "closes-stdout": ("import sys; print('x' * 10)", RUNS),
        "warns": ("import warnings; warnings.warn('mine')", RUNS),
        "changes-argv": ("import sys; sys.argv = []", RUNS),
        "dot-dot-workdir": ("c.workdir = 'a/../out'", RUNS),
        "float64": ("c.model.dtype = 'float64'", SOUND),
        "surrogate-workdir": (r"c.workdir = 'out\ud83d'", REFUSED),
        "emoji-workdir": ("c.workdir = 'out-🦊'", RUNS),
        "b2-below-b1": ("c.optimizer.b1, c.optimizer.b2 = 0.999, 0.9", SOUND),
        "warmup-longer": ("c.optimizer.warmup_steps = 100", SOUND),
        "accum-odd": ("c.grad_accum_steps = 3", REFUSED),
        "prompt-longer": ("c.data.max_prompt_length = 100", REFUSED),
        "best-metric": ("c.checkpoint.best_metric = 'no_such_metric'", REFUSED),
        "best-metric-no-eval": ("c.checkpoint.best_metric = 'loss'", REFUSED),
        "eval-fraction-tiny": ("c.data.eval_fraction = 1e-9", SOUND),
        "mesh-more": ("c.mesh.data = 7", REFUSED),
        "mesh-two-fill": ("c.mesh.data = -1", REFUSED),
        "length-2": ("c.data.max_length = 2", SOUND),
        "row-shorter": ("c.data.row_length = 8", SOUND),
        "records-1": ("c.data.max_records = 1", SOUND),
        "sgd-state": ("c.optimizer.name, c.optimizer.state_dtype, c.optimizer.b1 = 'sgd', 'int8', 0.0", REFUSED),
    }
    of = {
        "dpo": {
            "new-tokens-beyond": ("c.logging.samples_every = 1; c.rollout.max_new_tokens = 10**6", SOUND),
            "new-tokens-all": ("c.logging.samples_every = 1; c.rollout.max_new_tokens = 64", SOUND),
            "reference-nowhere": ("c.algorithm.reference_path = '/proc/nowhere'", REFUSED),
            "ipo-smoothing": ("c.algorithm.loss = 'ipo'; c.algorithm.label_smoothing = 0.1", SOUND),
            "name-sft": ("c.unlock(); c.algorithm.name = 'sft'", REFUSED),
        },
        "ppo": {
            "no-reward": ("c.rewards.function = None", REFUSED),
            "two-rewards": ("c.rewards.model = c.model.path", REFUSED),
            "reward-is-lm": ("c.rewards.function = None; c.rewards.model = c.model.path", REFUSED),
            "value-nowhere": ("c.algorithm.value_path = '/proc/nowhere'", REFUSED),
            "value-is-lm": ("c.algorithm.value_path = c.model.path", SOUND),
            "minibatches-more": ("c.algorithm.num_minibatches = 8", REFUSED),
            "new-tokens-beyond": ("c.rollout.max_new_tokens = 64", REFUSED),
            "temperature-0": ("c.rollout.temperature = 0.0", REFUSED),
            "top-k-beyond": ("c.rollout.top_k = 10**6", SOUND),
        },
        "reward": {
            "margin-missing": ("c.algorithm.use_margin = True", REFUSED),
            "model-is-reward": ("c.model.path = c.model.path + '-rm'", SOUND),
            "name-dpo": ("c.unlock(); c.algorithm.name = 'dpo'", REFUSED),
        },
        "sft": {
            "model-is-reward": ("c.model.path = c.model.path + '-rm'", REFUSED),
            "name-dpo": ("c.unlock(); c.algorithm.name = 'dpo'", REFUSED),
        },
    }
    chosen = [(rng.choice(ALGORITHMS[:3]), name, *rest) for name, rest in lines.items()]
    chosen += [(algorithm, name, *rest) for algorithm, more in of.items() for name, rest in more.items()]
    for algorithm, name, line, expect in chosen:

        def make(place, algorithm=algorithm, line=line):
            return train(place, algorithm, line)

        yield Case("configfile", f"{algorithm}-{name}", make, expect)


def _sections(rng):
    """A section that is no section any more."""
    values = {
        "none": "None",
        "number": "3",
        "text": '"adamw"',
        "list": "[]",
        "empty": "{}",
        "other": 'defaults("ppo").rollout',
    }
    for section in ("model", "data", "optimizer", "algorithm", "eval", "checkpoint", "logging", "mesh", "from"):
        for name, value in values.items():
            for unlock in ("", "c.unlock(); "):
                algorithm = rng.choice(ALGORITHMS)
                line = f'{unlock}c["{section}"] = {value}'

                def make(place, algorithm=algorithm, line=line):
                    return train(place, algorithm, line)

                title = f"{section}={name}{'-unlocked' if unlock else ''}-{algorithm}"
                yield Case("configfile", title, make, REFUSED, (section,))


def _stages():
    one = '    s, d = defaults("sft"), defaults("dpo")\n'
    body = {
        "stages-text": 'return stages("x")',
        "stages-nothing": "return stages()",
        "stages-none": "return stages(None)",
        "stages-number": "return stages(3, sft=s)",
        "stages-section-none": 'return stages("out", sft=None)',
        "stages-section-number": 'return stages("out", sft=3)',
        "stages-section-dict": 'return stages("out", sft={})',
        "stages-foreign-section": 'return stages("out", sft=s.optimizer)',
        "stages-seed-text": 'return stages("out", seed="x", sft=s)',
        "stages-seed-nan": 'return stages("out", seed=float("nan"), sft=s)',
        "stages-seed-negative": 'return stages("out", seed=-1, sft=s)',
        "stages-no-workdir": "return stages(sft=s)",
        "stages-unfilled": 'return stages("out", sft=s, dpo=d)',
        "stages-of-stages": 'return stages("out", a=stages("in", sft=s))',
        "stages-twice": 'c = stages("out", sft=s); c.stages = ("sft", "sft"); return c',
        "stages-unknown": 'c = stages("out", sft=s); c.stages = ("sft", "dpo"); return c',
        "stages-names-text": 'c = stages("out", sft=s); c.unlock(); c.stages = "sft"; return c',
        "stages-names-none": 'c = stages("out", sft=s); c.unlock(); c.stages = None; return c',
        "stages-names-empty": 'c = stages("out", sft=s); c.stages = (); return c',
        "stages-names-number": 'c = stages("out", sft=s); c.stages = (1,); return c',
        "stages-dots": 'return stages("out", **{"..": s})',
        "stages-slash": 'return stages("out", **{"a/b": s})',
        "stages-blank": 'return stages("out", **{"": s})',
        "stages-space": 'return stages("out", **{"a b": s})',
        "stages-named-seed": 'return stages("out", **{"stages": s})',
        "stages-from-itself": 'd["from"].model = "dpo"; return stages("out", dpo=d)',
        "stages-from-later": 'd["from"].model = "sft"; return stages("out", dpo=d, sft=s)',
        "stages-from-nobody": 'd["from"].model = "sfd"; return stages("out", sft=s, dpo=d)',
        "stages-from-wrong-kind": 'd["from"].reward = "sft"; return stages("out", sft=s, dpo=d)',
        "stages-from-reward": 'r = defaults("reward"); d["from"].model = "r"; return stages("out", r=r, dpo=d)',
        "stages-from-number": 'd["from"].model = 3; return stages("out", sft=s, dpo=d)',
        "stages-both": 'd["from"].model = "sft"; d.model.path = "x"; return stages("out", sft=s, dpo=d)',
        "stages-shared": 'return stages("out", sft=s, dpo=s)',
        "stages-field-of-none": 'c = stages("out", sft=s); c.optimizer.learning_rate = 1; return c',
    }
    for name, line in body.items():
        yield _file(name, f"{_HEAD}def get_config():\n{one}    {line}\n")
    two = f"{_HEAD}def get_config():\n{one}    return stages('out', sft=s, dpo=d)\n"
    for name, flag in {
        "flag-without-stage": "--config.optimizer.learning_rate=1",
        "flag-stage-misspelt": "--config.dpq.algorithm.beta=1",
        "flag-names": "--config.stages=dpo,sft,ppo",
        "flag-stage-whole": "--config.sft=3",
    }.items():
        yield _file(name, two, flags=(flag,))


def _paths():
    """The file itself, and how it is named."""

    def at(name, prepare, argument="--config=config.py", expect=REFUSED, more=()):
        def make(place):
            prepare(place)
            return ["train", argument, *more]

        return Case("configfile", f"path-{name}", make, expect, limit=30.0)

    def good(place):
        (place.here / "config.py").write_text(config_text(place.world, "sft"))

    yield at("missing", lambda p: None)
    yield at("blank", lambda p: None, "--config=")
    yield at("directory", lambda p: (p.here / "config.py").mkdir())
    yield at("fifo", lambda p: os.mkfifo(p.here / "config.py"))
    yield at("dangling", lambda p: (p.here / "config.py").symlink_to("gone.py"))
    yield at("loop", lambda p: (p.here / "config.py").symlink_to("config.py"))
    yield at("device", lambda p: (p.here / "config.py").symlink_to("/dev/zero"))
    yield at("no-suffix", lambda p: (p.here / "config").write_text("def get_config(): pass\n"), "--config=config")
    yield at("json", lambda p: (p.here / "config.json").write_text("{}"), "--config=config.json")
    yield at("nul", good, "--config=con\0fig.py")
    yield at("long", good, "--config=" + "x" * 1500 + ".py")
    yield at("argument-not-taken", good, "--config=config.py:tiny")
    yield at("colon", good, "--config=config.py:")
    yield at("twice", good, more=("--config=other.py",))
    yield at("url", good, "--config=https://localhost:1/config.py")
    yield at("unknown-flag", good, more=("--dry-run-please",))
    yield at("positional", good, more=("config.py",))
    yield at("dry-run-text", good, more=("--dry_run=maybe",))
    yield at("field-without-value", good, more=("--config.batch_size",))
    yield at("field-empty-name", good, more=("--config.=3",))
    yield at("field-dots", good, more=("--config...=3",))
    yield at("field-too-deep", good, more=("--config.batch_size.x=3",))
    yield at("section-as-value", good, more=("--config.optimizer=3",))
    yield at("section-unknown-key", good, more=('--config.optimizer={"lr": 3}',))
    yield at("section-number-key", good, more=("--config.optimizer={1: 3}",))
    yield at("section-deep", good, more=("--config.optimizer=" + "{" * 3000,))
    yield at("sources-literal", good, more=("--config.data.sources=[{",))
    yield at("sources-deep", good, more=("--config.data.sources=" + "[" * 3000 + "]" * 3000,))
    yield at("number-of-digits", good, more=("--config.batch_size=" + "9" * 5000,))
    yield at("exponent", good, more=("--config.batch_size=1e999999",))
    yield at("no-twice", good, more=("--noconfig.data.shuffle=3",))

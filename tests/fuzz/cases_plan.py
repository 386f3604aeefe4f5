"""`jaxalign plan`: its flags, its inputs, and configurations that a machine or a batch does not suit.

Most is refused before a compiler is asked for. What is found later, and what is good, is refused where the compilers
of absent machines (the extra `plan`) are not installed, with the words that say so.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil

from tests.fuzz.case import REFUSED, RUNS, SOUND, Case
from tests.fuzz.world import config_text

GPU = "gpu:h100:1x4x1"
TPU = "tpu:v5e:2x2"
MISSING = "[plan]"  # of the message where there is no compiler
THERE = importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec("libtpu") is not None


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `plan`."""
    return [*_flags(rng), *_configs(rng), *_inputs(), *_stages(), *_good()]


def arguments(place, *lines: str, on: str = GPU, algorithm: str = "sft", more: tuple[str, ...] = ()) -> list[str]:
    """The arguments that plan a config file with `lines` added; `on` "" leaves the machine out."""
    (place.here / "config.py").write_text(config_text(place.world, algorithm, *lines))
    return ["plan", "--config=config.py", *([f"--on={on}"] if on else []), *more]


def case(name, *lines, expect=REFUSED, words=(), group="plan", late=False, **options) -> Case:
    """A case of these lines and options of `arguments`; a late one is found with a compiler alone."""
    if late and not THERE:
        expect, words = REFUSED, tuple(f"{word}|{MISSING}" for word in words)
    after, limit = options.pop("after", None), options.pop("limit", 60.0)
    return Case(group, name, lambda place: arguments(place, *lines, **options), expect, words, after, limit)


_TEXTS = {
    "blank": "",
    "space": " ",
    "nul": "a\0b",
    "newline": "gpu:h100:1x4x1\n",
    "surrogate": "x\udcff",
    "long": "x" * 3000,
    "none": "None",
    "number": "8",
    "emoji": "🦊",
    "list": "gpu:h100:1x4x1,tpu:v5e",
}


def _flags(rng):
    for name, text in _TEXTS.items():
        yield case(f"on-{name}", on="", more=(f"--on={text}",), words=("on",))
        search = () if name in ("blank", "number") else ("search",)
        yield case(f"search-{name}", "c.model.path = 'nowhere/at/all'", more=(f"--search={text}",), words=search)
        yield case(f"assume-{name}", more=("--assume", text), words=("assume",))
        yield case(f"machines-{name}", more=(f"--machines={text}",), words=("machines",))
        fine = name not in ("blank", "space", "nul", "long")  # a file's name like another
        bad = "c.batch_size = -1" if fine else "c.seed = 0"
        yield case(f"json-{name}", bad, more=(f"--json={text}",), words=("batch_size" if fine else "json",))
    for text in ("0", "-1", "1001", "2.5", "1e3", "²", "٣", "9" * 5000, "+3", "1_0", "true"):
        name = text[:8].encode("ascii", "backslashreplace").decode()
        yield case(f"search={name}", "c.model.path = 'nowhere/at/all'", more=(f"--search={text}",), words=("search",))
    for flag in ("on", "json", "machines"):
        yield case(f"{flag}-last", on="" if flag == "on" else GPU, more=(f"--{flag}",), words=(flag,))
        value = GPU if flag == "on" else "x"
        yield case(f"{flag}-twice", on="", more=(f"--{flag}={value}",) * 2 + (f"--on={GPU}",), words=(flag,))
    for flag in ("onn", "jsn", "asume", "machine", "serch", "On", "ON"):
        yield case(f"misspelt-{flag}", more=(f"--{flag}=x",), words=(flag,))
    for name, more in {
        "positional": ("word",),
        "empty": ("",),
        "dash": ("-",),
        "dashes": ("--",),
        "two-configs": ("--config=config.py",),
        "dry-run": ("--dry_run",),
        "field": ("--config.no.such=1",),
        "search-apart": ("--search", "3"),
    }.items():
        yield case(f"argument-{name}", more=more)
    for name, make in {
        "directory": lambda p: (p.here / "x").mkdir(),
        "fifo": lambda p: __import__("os").mkfifo(p.here / "x"),
        "loop": lambda p: (p.here / "x").symlink_to("x"),
        "device": lambda p: (p.here / "x").symlink_to("/dev/zero"),
        "full": lambda p: (p.here / "x").symlink_to("/dev/full"),
        "below-a-file": lambda p: (p.here / "x").write_text("") and None,
    }.items():
        for flag in ("json", "machines"):
            if name == "full" and flag == "machines":
                continue
            value = "x/y.json" if name == "below-a-file" else "x"

            def prepared(place, make=make, flag=flag, value=value):
                make(place)
                return arguments(place, "c.batch_size = 3", more=(f"--{flag}={value}",))

            yield Case("plan", f"{flag}-{name}", prepared, REFUSED, (f"{MISSING}|batch_size|x",))
    for algorithm in rng.sample(("sft", "reward", "dpo", "ppo"), 4):
        yield Case("plan", f"{algorithm}-without-model", lambda p, a=algorithm: ["plan", a, f"--on={GPU}"], REFUSED,
                   ("model",))  # fmt: skip
        yield Case("plan", f"{algorithm}-model-nowhere",
                   lambda p, a=algorithm: ["plan", a, "--model=/proc/nowhere/at/all", f"--on={GPU}"], REFUSED,
                   (f"model|{MISSING}",))  # fmt: skip
    yield Case("plan", "bare-on", lambda p: ["plan", f"--on={GPU}"], REFUSED, ("config",))
    yield Case("plan", "dop", lambda p: ["plan", "dop", f"--on={GPU}"], REFUSED, ("dpo",))
    yield Case("plan", "config-nowhere", lambda p: ["plan", "--config=x.py", f"--on={GPU}"], REFUSED, ("x.py",))
    yield Case("plan", "help", lambda p: ["plan", "--help"], RUNS)


def _configs(rng):
    """Fields that a plan takes as training does, and batches, minibatches and meshes that do not divide."""
    for algorithm in ("sft", "reward", "dpo", "ppo"):
        for field, value in {
            "model.remat": '"some"', "optimizer.state_dtype": '"int4"', "checkpoint.every_minutes": "-1.0",
            "batch_size": "0", "mesh.tensor": "0", "num_train_steps": "-1",
        }.items():  # fmt: skip
            words = (field.rsplit(".", 1)[-1],)
            yield case(f"{algorithm}-{field}={value}", f"c.{field} = {value}", algorithm=algorithm, words=words)
    for field, value in {
        "rollout.tensor": "0", "rollout.max_new_tokens": "0", "rollout.num_samples": "0", "rewards.model": "7",
        "algorithm.num_minibatches": "0", "rollout.num_slots": "0", "rollout.tensor ": "-2", " rollout.tensor": "2.5",
    }.items():  # fmt: skip
        yield case(f"ppo-{field}={value}", f"c.{field.strip()} = {value}", algorithm="ppo",
                    words=(field.strip().rsplit(".", 1)[-1],))  # fmt: skip
    late = {
        "batch-3": ("c.batch_size = 3", "batch_size"),
        "batch-1": ("c.batch_size = 1", "batch_size"),
        "accumulation-3": ("c.batch_size, c.grad_accum_steps = 8, 3", "batch_size"),
        "accumulation-huge": ("c.grad_accum_steps = 10**6", "batch_size|grad_accum_steps"),
        "tensor-3": ("c.mesh.tensor = 3", "mesh"),
        "tensor-8": ("c.mesh.tensor = 8", "mesh"),
        "tensor-huge": ("c.mesh.tensor = 10**9", "mesh"),
        "data-5": ("c.mesh.data = 5", "mesh"),
        "fsdp-3": ("c.mesh.fsdp = 3", "mesh"),
        "two-left": ("c.mesh.data, c.mesh.fsdp = -1, -1", "mesh"),
    }
    for on in (GPU, TPU):
        for name, (line, word) in late.items():
            for algorithm in ("sft", "ppo") if on == GPU else ("dpo",):
                yield case(f"{on[:3]}-{algorithm}-{name}", line, on=on, algorithm=algorithm, words=(word,), late=True)
    for name, (line, word) in {
        "minibatches-3": ("c.batch_size, c.algorithm.num_minibatches = 8, 3", "batch_size"),
        "minibatches-8": ("c.batch_size, c.algorithm.num_minibatches = 8, 8", "batch_size"),
        "rollout-tensor-3": ("c.batch_size, c.rollout.tensor = 8, 3", "rollout.tensor"),
        "rollout-tensor-8": ("c.batch_size, c.rollout.tensor = 8, 8", "rollout.tensor"),
        "rollout-tensor-huge": ("c.batch_size, c.rollout.tensor = 8, 2**20", "rollout.tensor"),
        "completion-too-long": ("c.batch_size, c.rollout.max_new_tokens = 8, 64", "max_new_tokens|max_length"),
        "offload-and-huge-slots": ("c.batch_size, c.rollout.num_slots = 8, 10**9", "num_slots"),
    }.items():
        expect = SOUND if "slots" in name else REFUSED
        yield case(f"gpu-ppo-{name}", line, algorithm="ppo", words=(word,) if expect == REFUSED else (), late=True,
                    expect=expect, limit=180.0)  # fmt: skip


_MODELS = {
    "no-layers": {"num_hidden_layers": 0},
    "negative-layers": {"num_hidden_layers": -2},
    "heads-odd": {"num_attention_heads": 3, "num_key_value_heads": 2},
    "heads-zero": {"num_attention_heads": 0},
    "vocab-zero": {"vocab_size": 0},
    "vocab-small": {"vocab_size": 3},
    "width-text": {"hidden_size": "16"},
    "width-part": {"hidden_size": 16.5},
    "width-huge": {"hidden_size": 10**12},
    "family": {"model_type": "nonsense", "architectures": ["Nonsense"]},
    "no-family": {"model_type": None, "architectures": None},
    "rope-nan": {"rope_theta": float("nan")},
}


def _inputs():
    """Models and data that are broken or not here."""

    def model(name, prepare, words, late=True):
        def make(place):
            shutil.copytree(place.world / "model", place.here / "m")
            prepare(place.here / "m")
            return arguments(place, "c.model.path = 'm'", "c.batch_size = 8")

        words = tuple(f"{word}|{MISSING}" for word in words)
        return Case("plan", f"model-{name}", make, REFUSED, words)

    for name, change in _MODELS.items():

        def prepare(path, change=change):
            file = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(file | change))

        yield model(name, prepare, ("config|vocab|tokenizer",))
    for name, text in {"blank": "", "list": "[]", "cut": '{"a": ', "number": "3", "deep": "[" * 100000}.items():
        yield model(f"config-{name}", lambda path, t=text: (path / "config.json").write_text(t), ("config",))
    yield model("no-config", lambda path: (path / "config.json").unlink(), ("config",))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        yield model(f"{file}-blank", lambda path, f=file: (path / f).write_text(""), ("token",))
    for field in ("data.sources", "data.eval_sources"):
        for name, value in {
            "nowhere": '("./nope.jsonl",)', "absolute": '("/proc/nowhere.jsonl",)', "blank": '("",)', "number": "(1,)",
            "directory": '("/proc",)', "glob": '("*.json-lines",)', "broken": '("broken.jsonl",)',
            "empty": '("empty.jsonl",)',
        }.items():  # fmt: skip

            def make(place, field=field, value=value):
                (place.here / "broken.jsonl").write_text('{"prompt": \n')
                (place.here / "empty.jsonl").write_text("")
                return arguments(place, "c.batch_size = 8", f"c.{field} = {value}")

            words = () if name == "number" else (f"data|{field}|jsonl|proc|json-lines|{MISSING}",)
            yield Case("plan", f"{field}-{name}", make, REFUSED, words)
    for field in ("rewards.model", "algorithm.value_path", "algorithm.reference_path"):
        for name, value in {"blank": '" "', "number": "7", "broken": '"broken"'}.items():

            def make(place, field=field, value=value):
                (place.here / "broken").mkdir()
                (place.here / "broken/config.json").write_text("[]")
                lines = ["c.rewards.function = None"] if field == "rewards.model" else []
                return arguments(place, *lines, "c.batch_size = 8", f"c.{field} = {value}", algorithm="ppo")

            yield Case("plan", f"ppo-{field}-{name}", make, REFUSED)


def _stages():
    """Configs of several stages: the stage that is wrong is named."""
    for name, changes, words, late in (
        ("unknown-start", {"dpo": "c['from'].model = 'nonsense'"}, ("nonsense", "dpo"), False),
        ("itself", {"dpo": "c['from'].model = 'dpo'"}, ("dpo",), False),
        ("circle", {"sft": "c['from'].model = 'dpo'", "dpo": "c['from'].model = 'sft'"}, ("sft",), False),
        ("field", {"dpo": "c.optimizer.b1 = 2.0"}, ("dpo", "b1"), False),
        ("first-field", {"sft": "c.batch_size = 0"}, ("sft", "batch_size"), False),
        ("batch", {"dpo": "c.batch_size = 3"}, ("dpo.batch_size", "stage dpo"), True),
        ("mesh", {"sft": "c.mesh.tensor = 3"}, ("sft.mesh", "stage sft"), True),
        ("data", {"dpo": "c.data.sources = ('./nope.jsonl',)"}, ("nope.jsonl", "stage dpo"), True),
        ("reference", {"dpo": "c['from'].reference = 'nonsense'"}, ("reference",), False),
    ):

        def make(place, changes=changes):
            text = ""
            for stage in ("sft", "dpo"):
                lines = ["c.batch_size = 8"]
                lines += ["c.model.path = None", "c['from'].model = 'sft'"] if stage == "dpo" else []
                lines += [changes[stage]] if stage in changes else []
                text += config_text(place.world, stage, *lines).replace("get_config", stage) + "\n\n"
            text += "def get_config():\n    from jaxalign.config import stages\n\n"
            text += "    return stages('out', sft=sft(), dpo=dpo())\n"
            (place.here / "config.py").write_text(text)
            return ["plan", "--config=config.py", f"--on={GPU}", "--json=plan.json"]

        words = tuple(f"{word}|{MISSING}" for word in words) if late else words
        yield Case("plan", f"stages-{name}", make, REFUSED, words)


def complaint(plan: dict) -> str:
    """What is wrong with the numbers of a plan; "" where they agree with each other."""
    pool, v = plan["machine"]["pool"], plan["assumptions"]
    for name, stage in plan["stages"].items():
        total = 0.0
        for p in stage["programs"]:
            where, memory, time = f"{name} {p['name']}", p["memory"], p["seconds"]
            held = sum(n for role, n in memory.items() if role not in ("peak", "pool"))
            if memory["peak"] < held or min(memory.values()) < 0:
                return f"{where}: the peak is below what is held: {memory}"
            if p["fits"] != (memory["peak"] <= pool):
                return f"{where}: fits is {p['fits']}: {memory}"
            parts = time["products"] + time["traffic"] + time["collectives"] + time["gaps"]
            if min(time.values()) < 0 or not math.isclose(parts, time["total"], rel_tol=1e-9):
                return f"{where}: the parts are not the whole: {time}"
            least = p["flops"]["products"] / (v["flops"] * v["efficiency"])
            if time["products"] < least * (1 - 1e-9):
                return f"{where}: products are faster than the device: {time['products']} s below {least} s"
            if not 0 <= p["mfu"] <= 1:
                return f"{where}: MFU {p['mfu']}"
            total += time["total"] * p["times"]
        if not math.isclose(total, stage["iteration"]["seconds"], rel_tol=1e-9):
            return f"{name}: programs take {total} s, the iteration {stage['iteration']['seconds']} s"
    return ""


def _consistent(place, status):
    """The JSON that was written, read strictly."""
    file = place.here / "plan.json"
    if not file.exists():
        return "" if status else "no plan.json"

    def none(text):
        raise ValueError(f"{text} in the JSON")

    try:
        return complaint(json.loads(file.read_text(), parse_constant=none))
    except ValueError as error:
        return str(error)


def _good():
    """What is well: it runs where the compilers are, and its numbers agree."""
    for name, algorithm, on, lines, more in (
        ("sft", "sft", GPU, ("c.batch_size = 8",), ()),
        ("remat-auto", "dpo", GPU, ("c.batch_size, c.model.remat = 8, 'auto'",), ()),
        ("remat-attention", "reward", "gpu:l4:1x1x2", ("c.model.remat = 'attention'",), ()),
        ("int8", "sft", "gpu:a100-40:2x1x1", ("c.optimizer.state_dtype = 'int8'",), ("--assume=launch=0",)),
        ("tiny-pool", "sft", "gpu:h100:1x1x1", (), ("--assume=pool=1e-7",)),
        ("search", "sft", "gpu:h100:1x2x1", (), ("--search=1",)),
        ("data-elsewhere", "dpo", "gpu:h100:1x2x1", ("c.data.sources = ('owner/name',)",), ()),
        ("ppo-tensor", "ppo", "gpu:h100:1x2x1", ("c.rollout.tensor = 2",), ()),
        ("tpu", "sft", TPU, ("c.batch_size, c.data.packing = 8, True",), ()),
    ):
        expect = REFUSED if name == "tiny-pool" else RUNS
        yield case(f"good-{name}", *lines, algorithm=algorithm, on=on, more=(*more, "--json=plan.json"), expect=expect,
                    words=("pool|memory|fit|GiB",) if expect == REFUSED else (), late=True, after=_consistent,
                    limit=300.0)  # fmt: skip

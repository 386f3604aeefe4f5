"""What may happen to a run between its kill and its resumption: damaged files, changed inputs, a full disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

from tests.fuzz.case import REFUSED, RUNS, SOUND, WARNS, Case
from tests.fuzz.cases_models import changed
from tests.fuzz.inside import call
from tests.fuzz.pool import own_mounts
from tests.fuzz.runs import ARGUMENTS, KILLED, differs, directory, put
from tests.fuzz.runs import RUNS as ALL

LIMIT = 150.0

DAMAGES = {
    "halved": lambda d, r: d[: len(d) // 2],
    "emptied": lambda d, r: b"",
    "deleted": None,
    "bit-flipped": lambda d, r: _flip(d, r.randrange(max(1, len(d))), 1 << r.randrange(8)),
    "first-bit": lambda d, r: _flip(d, 0, 1),
    "last-bit": lambda d, r: _flip(d, len(d) - 1, 128),
    "longer": lambda d, r: d + r.randbytes(64),
    "zeroed": lambda d, r: bytes(len(d)),
    "random": lambda d, r: r.randbytes(len(d)),
    "other-json": lambda d, r: b"{}",
    "list": lambda d, r: b"[]",
    "not-utf-8": lambda d, r: b"\xff\xfe\x00" + d,
    "foreign-line": lambda d, r: d + b'{"not": "ours"}\nhello\n',
}


def _flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :] if data else data


def cases(rng: random.Random) -> list[Case]:
    """The cases of the groups `damage`, `change` and `disk`."""
    return [*_checkpoints(rng), *_side_files(rng), *_finished(), *_changes(), *_disks()]


def _damaged(file: Path, damage: str, rng: random.Random) -> None:
    change = DAMAGES[damage]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes(), rng))


def _resumed(run, *, metrics=True):
    """An accepted continuation is the uninterrupted run; after a refusal nothing more is asked."""
    return lambda place, status: differs(place, run, metrics=metrics) if status == 0 else ""


def _checkpoints(rng):
    """A file of the latest checkpoint, or of both; half of them at random, what users meet most always."""
    for run in ALL:
        chosen = [("largest", d) for d in ("halved", "emptied", "deleted", "bit-flipped", "zeroed")]
        chosen += [("every", d) for d in ("emptied", "deleted", "bit-flipped")]
        plain = [d for d in DAMAGES if d not in ("foreign-line", "list")]
        chosen += [(f"file-{n}", rng.choice(plain)) for n in rng.sample(range(16), 10)]
        chosen += [("both", "bit-flipped"), ("both", "deleted")]
        for which, damage in chosen:
            seed = rng.random()

            def make(place, run=run, which=which, damage=damage, seed=seed):
                folder = put(place, run, "killed") / "checkpoints"
                steps = sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
                assert len(steps) == 2, [p.name for p in folder.iterdir()]
                dice = random.Random(seed)
                for step in steps if which == "both" else steps[-1:]:
                    files = sorted(p for p in step.rglob("*") if p.is_file())
                    if which in ("largest", "both"):
                        files = [max(files, key=lambda p: p.stat().st_size)]
                    elif which != "every":
                        files = [files[int(which.removeprefix("file-")) % len(files)]]
                    for file in files:
                        _damaged(file, damage, dice)
                return ARGUMENTS

            words = ("checkpoint",)
            yield Case("damage", f"{run}-checkpoint-{which}-{damage}", make, SOUND, words, _resumed(run), LIMIT)


def _side_files(rng):
    kinds = {
        "config.json": tuple(DAMAGES),
        "metrics.jsonl": tuple(DAMAGES),
        "data_report.json": ("emptied", "not-utf-8", "deleted"),
        "cache/*/tokens.bin": ("bit-flipped", "halved", "emptied", "deleted", "longer"),
        "cache/*/scored.bin": ("bit-flipped", "halved", "deleted"),
        "cache/*/table.npy": ("bit-flipped", "halved", "emptied", "deleted", "random"),
        "cache/*/record_ends.npy": ("bit-flipped", "halved", "deleted"),
        "cache/*/records.jsonl": ("bit-flipped", "halved", "deleted", "not-utf-8", "foreign-line"),
        "cache/*/meta.json": ("bit-flipped", "emptied", "deleted", "other-json", "list", "not-utf-8"),
        "cache/reference-*": ("halved", "emptied", "deleted", "bit-flipped", "random"),
        "stage.json": ("emptied", "other-json", "list", "not-utf-8", "halved", "deleted"),
    }
    for run in ALL:
        for pattern, damages in kinds.items():
            if (pattern == "stage.json") != (run == "stages") and pattern == "stage.json":
                continue
            if "reference" in pattern and run != "dpo":
                continue
            for damage in rng.sample(damages, min(3, len(damages))):
                seed = rng.random()

                def make(place, run=run, pattern=pattern, damage=damage, seed=seed):
                    files = sorted(put(place, run, "killed").glob(pattern))
                    assert files, pattern
                    for file in files:
                        _damaged(file, damage, random.Random(seed))
                    return ARGUMENTS

                own = pattern in ("metrics.jsonl", "config.json", "stage.json")
                after = _resumed(run, metrics=pattern not in ("metrics.jsonl", "stage.json"))
                name = pattern.replace("*/", "").replace("*", "").replace("/", "-")
                yield Case("damage", f"{run}-{name}-{damage}", make, SOUND if own else RUNS, (), after, LIMIT)
        for name, file in (("foreign-file", "notes.txt"), ("foreign-export", "export/notes.txt")):

            def make(place, run=run, file=file):
                path = put(place, run, "killed") / file
                path.parent.mkdir(exist_ok=True)
                path.write_text("mine")
                return ARGUMENTS

            def kept(place, status, run=run, file=file):
                if not (directory(place.here, run) / file).exists():
                    return "a file of the user's is gone"
                return differs(place, run) if status == 0 else ""

            yield Case("damage", f"{run}-{name}", make, SOUND, (), kept, LIMIT)


def _finished():
    """A finished run whose files are damaged, then run again."""
    for run in ALL:
        for damage in ("emptied", "other-json", "list", "halved", "not-utf-8", "deleted"):

            def make(place, run=run, damage=damage):
                _damaged(put(place, run, "whole") / "DONE", damage, random.Random(0))
                return ARGUMENTS

            yield Case("damage", f"{run}-DONE-{damage}", make, SOUND, (), _resumed(run), LIMIT)

        def gone(place, run=run):
            (put(place, run, "whole") / "export" / "model.safetensors").unlink()
            return ARGUMENTS

        yield Case("damage", f"{run}-export-deleted", gone, WARNS, ("holds no model",), limit=LIMIT)


def _weights(place, change) -> None:
    from safetensors.numpy import load_file, save_file

    file = place.here / "model" / "model.safetensors"
    tensors = {k: change(v) for k, v in load_file(file).items()}
    save_file(tensors, file)


def _line(place, old: str, new: str) -> None:
    file = place.here / "config.py"
    text = file.read_text()
    assert old in text, old
    file.write_text(text.replace(old, new))


def _data(place, change) -> None:
    file = place.here / "data.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in change(lines)))


def _changes():
    """What a run was begun with, changed before it is resumed."""
    add = lambda text: lambda p: _line(p, "    return c\n", f"    {text}\n    return c\n")  # noqa: E731
    changes = {
        "row-edited": (lambda p: _data(p, lambda r: [*r[:-1], {k: f"{v} x" for k, v in r[-1].items()}]), ("data",)),
        "row-added": (lambda p: _data(p, lambda r: [*r, {k: f"{v} x" for k, v in r[0].items()}]), ("data",)),
        "row-gone": (lambda p: _data(p, lambda r: r[:-1]), ("data",)),
        "rows-turned": (lambda p: _data(p, lambda r: r[::-1]), ("data",)),
        "data-emptied": (lambda p: (p.here / "data.jsonl").write_text(""), ("data",)),
        "data-gone": (lambda p: (p.here / "data.jsonl").unlink(), ("data",)),
        "weights-other": (lambda p: _weights(p, lambda v: v * 1.5), ("model",)),
        "weights-one-bit": (lambda p: _weights(p, lambda v: _one_bit(v)), ("model",)),
        "theta-other": (lambda p: changed(p.here / "model" / "config.json",
                                          rope_parameters={"rope_type": "default", "rope_theta": 500.0}), ("model",)),
        "learning-rate": (add("c.optimizer.learning_rate = 2e-3"), ("learning_rate",)),
        "batch-size": (add("c.batch_size = 8"), ("batch_size",)),
        "seed": (add("c.seed = 1"), ("seed",)),
        "max-length": (add("c.data.max_length = 40"), ("max_length",)),
        "optimizer": (add("c.optimizer.name = 'sgd'"), ("optimizer",)),
        "dtype": (add("c.model.dtype = 'bfloat16'"), ("dtype",)),
        "held-out": (add("c.data.eval_fraction = 0.5"), ("eval_fraction",)),
        "template": (lambda p: changed(p.here / "model" / "tokenizer_config.json", chat_template="x"), ("template",)),
        "resume-off": (add("c.checkpoint.resume = False"), ("resume",)),
        "fewer-steps": (add(f"c.num_train_steps = {KILLED - 2}"), ("num_train_steps",)),
    }  # fmt: skip
    for run in ALL:
        for name, (change, words) in changes.items():
            # Stages: with another key one is run anew, its earlier result kept; what is shared or not there is refused.
            anew = run == "stages" and not name.startswith(("data", "resume", "seed"))

            def make(place, run=run, change=change):
                put(place, run, "killed")
                change(place)
                return ARGUMENTS

            if (run, name) == ("stages", "seed"):  # a stage's own is not read
                yield Case("change", f"{run}-{name}", make, WARNS, words, _resumed(run), LIMIT)
            elif anew:
                yield Case("change", f"{run}-{name}", make, WARNS, ("kept as",), _kept_aside, LIMIT)
            else:
                yield Case("change", f"{run}-{name}", make, REFUSED, words, limit=LIMIT)

    def held_out(place):
        put(place, "reward", "killed")
        add("c.data.eval_sources = ('data.jsonl',)")(place)
        return ARGUMENTS

    yield Case("change", "reward-eval-sources", held_out, REFUSED, ("eval",), limit=LIMIT)

    def reward(place):
        put(place, "ppo", "killed")
        file = place.here / "r.py"
        file.write_text(file.read_text().replace("len(c)", "-len(c)"))
        return ARGUMENTS

    yield Case("change", "ppo-reward-function", reward, REFUSED, ("reward",), limit=LIMIT)
    for damage in ("halved", "emptied", "deleted", "bit-flipped", "zeroed"):

        def first(place, damage=damage):
            put(place, "stages", "killed")
            _damaged(place.here / "out" / "sft" / "export" / "model.safetensors", damage, random.Random(damage))
            return ARGUMENTS

        yield Case("damage", f"stages-first-export-{damage}", first, SOUND, ("model",), _resumed("stages"), LIMIT)
    for run in ALL:

        def without(place, run=run):
            put(place, run, "killed")
            (place.here / "model" / "model.safetensors").unlink()
            return ARGUMENTS

        yield Case("change", f"{run}-weights-gone", without, SOUND, ("model",), _resumed(run), LIMIT)
    fine = {
        "nothing": lambda p: None,
        "logging": add("c.logging.every = 2; c.logging.every = 1"),
        "remat": add("c.model.remat = 'full'"),
        "reward-file-touched": lambda p: (p.here / "r.py").touch(),
        "data-touched": lambda p: (p.here / "data.jsonl").touch(),
    }
    for run in ALL:
        for name, change in fine.items():

            def make(place, run=run, change=change):
                put(place, run, "killed")
                change(place)
                return ARGUMENTS

            same = name != "remat"  # by rounding
            after = _resumed(run) if same else None
            yield Case("change", f"{run}-{name}", make, RUNS, (), after, LIMIT)


def _kept_aside(place, status) -> str:
    """What the killed run of the second stage had saved is still there, and the new run is done."""
    if not list(place.here.glob("out/dpo.old-1/checkpoints/*")):
        return "what was saved of the earlier run is gone"
    return "" if (place.here / "out" / "dpo" / "DONE").exists() else "the run is not done"


def _one_bit(array):
    import numpy as np

    bits = array.copy().view(np.uint32)
    bits.flat[0] ^= 1
    return bits.view(np.float32)


def _disks():
    """A disk that is full at some write; the same command goes on when there is room."""
    if not own_mounts():
        return
    for run in ALL:
        for kib in (96, 160, 224, 288, 352, 416, 480, 544, 608, 704, 800, 1000, 1300, 1700):

            def make(place, run=run, kib=kib):
                from tests.fuzz.runs import lay_out, made

                made(place, run, "whole")
                lay_out(place.here, place.world, run)
                out = place.here / "out"
                out.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(out)], check=True)
                return ARGUMENTS

            def after(place, status, run=run):
                out = place.here / "out"
                try:
                    if status != 0:
                        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
                        status, text = call(ARGUMENTS)
                        if status != 0:
                            return f"with room it does not go on: status {status}: {text[-400:]}"
                    return differs(place, run)
                finally:
                    os.chdir(place.here)
                    subprocess.run(["umount", "--lazy", str(out)], check=False)

            yield Case("disk", f"{run}-{kib}-KiB", make, SOUND, ("space|full|room",), after, LIMIT)

"""Machines to plan for: by names that are none, in files that say nothing, with numbers that mean nothing."""

from __future__ import annotations

import json
import random

from jaxalign.parallel.hardware import _TARGET, Hardware, read_machines
from jaxalign.plan.predict import assumptions
from tests.fuzz.case import REFUSED, SOUND, Case
from tests.fuzz.cases_plan import GPU, MISSING, THERE, arguments
from tests.fuzz.cases_plan import case as planned


def cases(rng: random.Random) -> list[Case]:
    """The cases of the groups `assume`, `shapes` and `machines`."""
    return [*_assumed(), *_shapes(rng), *_machines(rng)]


def _assumed():
    """Each number of a prediction at values that mean nothing."""
    names = [line.partition("=")[0] for line in assumptions(read_machines()["h100"]).lines()]
    for name in names:
        for value in ("nan", "inf", "-inf", "-1", "", "x", "1e400", "1e31", "None", "0x10", "1,5", "9" * 5000):
            title = f"{name}={value[:6] or 'blank'}"
            yield planned(title, group="assume", more=("--assume", f"{name}={value}"), words=("assume", name))
        if name not in ("launch", "latency", "price", "steps"):
            yield planned(f"{name}=0", group="assume", more=("--assume", f"{name}=0"), words=("assume", name))
        yield planned(f"{name}-alone", group="assume", more=("--assume", name), words=("assume", name))
        yield planned(f"{name}-misspelt", group="assume", more=("--assume", f"{name}x=0.5"), words=("assume", name))


def _shapes(rng):
    """Machines by name: forms that are none, and shapes at random; the config asks for a model that is nowhere."""
    forms = [
        "h100", "gpu", "gpu:", "gpu:h100", "gpu:h100:", "gpu::1x8x1", ":h100:1x8x1", "gpu:h100:8", "gpu:h100:1x8",
        "gpu:h100:1x8x1x1", "gpu:h100:1x8x1:2", "gpu:h100:0x8x1", "gpu:h100:1x0x1", "gpu:h100:-1x8x1",
        "gpu:h100:1X8X1", "GPU:h100:1x8x1", "gpu:H100:1x8x1", "gpu:h100:1*8*1", "gpu:h100: 1x8x1", "gpu:h100:1x8x1 ",
        "gpu:h100:axbxc", "gpu:v5p:1x8x1", "gpu:h220:1x8x1", "gpu:tpu7x:1x8x1", "gpu:b200:1x8x1", "cpu:x:1",
        "tpu:v5p", "tpu:v5p:", "tpu:h100:2x2x2", "tpu:v4:2x2x2", "tpu:v9:2x2", "tpu:v5p:0x2x2", "tpu:v5e:2x2:0",
        "tpu:v5e:2x2:", "tpu:v5e:2x2:x", "tpu:v5e:2x2:-1", "tpu:v5e:2x2x2:1:1", "gpu:h100:1x8x1.5", "gpu:h100:1e1x8x1",
        "gpu:h100:١x٨x١", "gpu:h100:²x1x1", "gpu:h100:1x8x" + "9" * 5000, "tpu:v5e:" + "9" * 5000 + "x2",
        "tpu:v5e:2x2:" + "9" * 5000, "gpu:h100:1x8x100000000", "gpu:h100:100000x100000x100000", "gpu:h100:99999999x1x1",
        "tpu:v5e:100000000x2", "tpu:v5p:2x2x" + "9" * 30, "tpu:v5e:2x2:100000000", "gpu:a-:1x1x1", "gpu:-:1x1x1",
    ]  # fmt: skip
    for i, form in enumerate(forms):
        title = form[:24].encode("ascii", "backslashreplace").decode().replace(" ", "_")
        yield planned(f"name-{i}-{title}", group="shapes", on="", more=(f"--on={form}",), words=("machine|" + MISSING,))
    kinds = list(read_machines())
    for i in range(40):
        kind = rng.choice([*kinds, "h100", "v5e", "v5p", "h200x", "x" * rng.randint(1, 5)])
        sides = [str(rng.choice((1, 2, 3, 4, 5, 8, 16, rng.randint(1, 300)))) for _ in range(rng.randint(1, 5))]
        slices = f":{rng.randint(0, 5)}" if rng.random() < 0.3 else ""
        on = f"{rng.choice(('gpu', 'tpu'))}:{kind}:{'x'.join(sides)}{slices}"
        yield planned(f"{i}-{on}", "c.data.sources = ('nope.jsonl',)", group="shapes", on=on)


_VALUES = {
    "nan": "nan", "inf": "inf", "minus-inf": "-inf", "negative": "-1", "text": '"8"', "true": "true", "list": "[8]",
    "table": "{ a = 1 }", "date": "2026-01-01", "huge": "1e300", "digits": "1" * 400,
}  # fmt: skip
_OWN = """[mine]
platform = "gpu"
kinds = ["NVIDIA MINE"]
flops = 1e14
memory = 10_000_000_000
bandwidth = 1e12
link = 1e11
domain = 8
network = 1e10
"""
_GIVEN = {k: json.dumps(v) for k, v in (read_machines()["h100"].target or {}).items()}
_OWN += "target = { " + ", ".join(f"{k} = {v}" for k, v in _GIVEN.items()) + " }\n"


def _machines(rng):
    """Files of machines: fields that are missing, beyond what there is, and numbers that are none."""

    def case(name, text, words=(), expect=REFUSED, on="gpu:mine:1x4x1", late=False, **options):
        if late and not THERE:
            expect, words = REFUSED, (MISSING,)

        def make(place):
            data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            (place.here / "mine.toml").write_bytes(data)
            return arguments(place, on=on, more=("--machines=mine.toml",))

        return Case("machines", name, make, expect, words, **options)

    numbers = [f for f in Hardware._fields if f not in ("name", "kinds", "platform", "target")]
    lines = _OWN.splitlines()
    with_field = lambda field, value: "\n".join(  # noqa: E731
        [line for line in lines if not line.startswith(f"{field} =")] + [f"{field} = {value}"]
    )
    for field in numbers:
        for name, value in _VALUES.items():
            yield case(f"{field}={name}", with_field(field, value), (field,))
        if field not in ("launch", "latency", "wrap"):
            yield case(f"{field}=0", with_field(field, "0"), (field,))
        if field in ("memory", "domain", "axes", "wrap"):
            yield case(f"{field}=part", with_field(field, "2.5"), (field,))
    for field in ("pool", "efficiency"):
        yield case(f"{field}=2", with_field(field, "2.0"), (field,))
    yield case("memory=1", with_field("memory", "1"), ("GiB",), late=True)
    for field in ("kinds", "flops", "memory", "bandwidth", "link", "network", "target"):
        text = "\n".join(line for line in lines if not line.startswith(f"{field} ="))
        yield case(f"without-{field}", text, (field,))
    for name, value in {
        "empty": "[]",
        "text": '"A"',
        "number": "[1]",
        "blank": '[""]',
        "nested": '[["a"]]',
    }.items():
        yield case(f"kinds={name}", with_field("kinds", value), ("kinds",))
    for name, value in {"quote": "['a\"b']", "brace": "['a } b']", "newline": '["a\\nb"]'}.items():
        yield case(f"kinds={name}", with_field("kinds", value), expect=SOUND)
    for name, value in {"cpu": '"cpu"', "upper": '"GPU"', "number": "1", "list": '["gpu"]', "blank": '""'}.items():
        yield case(f"platform={name}", with_field("platform", value), ("platform|machine",))
    for part in _TARGET:
        own = {k: v for k, v in _GIVEN.items() if k != part}
        write = lambda entry: with_field("target", "{ " + ", ".join(f"{k} = {v}" for k, v in entry.items()) + " }")  # noqa: E731
        yield case(f"target-without-{part}", write(own), ("target", part))
        values = _VALUES | (
            {"zero": "0"} if part != "capability" else {"zero": '""', "word": '"nine"', "dots": '"9.0.1.2"'}
        )
        for name, value in values.items():
            if part == "capability" and name == "text":
                continue  # 8.0
            yield case(f"target-{part}={name}", write(own | {part: value}), (part,))
    yield case("target-more", write(_GIVEN | {"colour": "1"}), ("colour",))
    for name, value in {"text": '"x"', "list": "[1]", "empty": "{}", "number": "3"}.items():
        yield case(f"target={name}", with_field("target", value), ("target",))
    for name in ("colour", "flop", "Memory", "name", "_fields", "memroy"):
        yield case(f"more-{name}", with_field(name, "1"), (name,))
    for name, text in {
        "blank": "", "space": " \n", "no-table": "flops = 1e12", "word": "hello", "json": '{"h100": {}}',
        "open": "[mine", "twice": _OWN + _OWN, "array": "[[mine]]\nflops = 1", "nul": "[mine]\0",
        "latin": b"[mine]\n# \xff",
        "utf16": _OWN.encode("utf-16"), "deep": "a = " + "[" * 3000, "deep-tables": "[" + ".".join("a" * 2000) + "]",
        "value": "mine = 3", "nested": "[mine.a]\nb = 1", "binary": bytes(range(256)),
        "cut": _OWN[: rng.randint(30, len(_OWN) - 30)], "digits": "[mine]\nflops = " + "9" * 5000,
    }.items():  # fmt: skip
        yield case(f"file-{name}", text, ("machine|mine.toml",))
    for name in ("h 100", "h100!", "ü", "x.y", "", "a" * 2000):
        yield case(f"name-{name[:8].encode('ascii', 'replace').decode() or 'blank'}",
                   _OWN.replace("[mine]", f'["{name}"]'), ("machine",))  # fmt: skip
    for i in range(25):
        field, name = rng.choice(numbers), rng.choice(list(_VALUES))
        text = f"[{rng.choice(('h100', 'h200', 'v5e', 'v4', 'l40'))}]\n{field} = {_VALUES[name]}\n"
        yield case(f"random-{i}-{field}={name}", text, (field,), on=GPU)
    yield case("bom", "\ufeff" + _OWN, expect=SOUND, limit=120.0)

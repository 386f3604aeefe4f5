"""Reward functions and reward models that give something else than a number for each completion."""

from __future__ import annotations

import random

from tests.fuzz.case import REFUSED, RUNS, SOUND, Case
from tests.fuzz.cases_models import changed, copied, edit
from tests.fuzz.world import train

_BODIES = {  # name: (what the function does, what is expected)
    "none": ("return None", REFUSED),
    "nones": ("return [None] * len(completions)", REFUSED),
    "one-none": ("return [None] + [1.0] * (len(completions) - 1)", SOUND),
    "nan": ('return [float("nan")] * len(completions)', REFUSED),
    "one-nan": ('return [1.0] * (len(completions) - 1) + [float("nan")]', REFUSED),
    "inf": ('return [float("inf")] * len(completions)', REFUSED),
    "minus-inf": ('return [-float("inf")] * len(completions)', REFUSED),
    "digits": ("return [10**400] * len(completions)", REFUSED),
    "huge": ("return [1e300] * len(completions)", REFUSED),
    "large": ("return [1e37] * len(completions)", SOUND),
    "fraction": ("import fractions; return [fractions.Fraction(1, 3)] * len(completions)", RUNS),
    "decimal": ('import decimal; return [decimal.Decimal("1e5000")] * len(completions)', REFUSED),
    "text": ('return ["1"] * len(completions)', REFUSED),
    "truths": ("return [True] * len(completions)", RUNS),
    "complex": ("return [1j] * len(completions)", REFUSED),
    "lists": ("return [[1.0]] * len(completions)", REFUSED),
    "objects": ("return [object()] * len(completions)", REFUSED),
    "bad-float": ('return [type("F", (), {"__float__": lambda s: 1 / 0})()] * len(completions)', REFUSED),
    "number": ("return 1.0", REFUSED),
    "string": ('return "x" * len(completions)', REFUSED),
    "dict": ("return dict.fromkeys(range(len(completions)), 1.0)", REFUSED),
    "set": ("return {1.0}", REFUSED),
    "generator": ("return (1.0 for _ in completions)", REFUSED),
    "empty": ("return []", REFUSED),
    "short": ("return [1.0] * (len(completions) - 1)", REFUSED),
    "long": ("return [1.0] * (len(completions) + 1)", REFUSED),
    "array": ("import numpy as np; return np.ones(len(completions))", RUNS),
    "array-2d": ("import numpy as np; return np.ones((len(completions), 2))", REFUSED),
    "array-column": ("import numpy as np; return np.ones((len(completions), 1))", SOUND),
    "array-nan": ("import numpy as np; return np.full(len(completions), np.nan)", REFUSED),
    "array-objects": ("import numpy as np; return np.array([None] * len(completions))", REFUSED),
    "scalar-array": ("import numpy as np; return np.float32(1)", REFUSED),
    "jax": ("import jax.numpy as jnp; return jnp.ones(len(completions))", RUNS),
    "constant": ("return [0.0] * len(completions)", RUNS),
    "value-error": ('raise ValueError("my words")', REFUSED),
    "key-error": ("return {}[1]", REFUSED),
    "assertion": ("assert False", REFUSED),
    "recursion": ("return reward(prompts, completions)", REFUSED),
    "memory": ("raise MemoryError", REFUSED),
    "stop-iteration": ("raise StopIteration", REFUSED),
    "long-message": ('raise ValueError("x" * 100_000)', REFUSED),
    "surrogate-message": ('raise ValueError("\\ud83d")', REFUSED),
    "group": ('raise ExceptionGroup("many", [ValueError(1)])', REFUSED),
    "exit-0": ("import sys; sys.exit(0)", REFUSED),
    "exit-text": ('import sys; sys.exit("bye")', REFUSED),
    "exit-3": ("import sys; sys.exit(3)", REFUSED),
    "own-base": ('raise type("Own", (BaseException,), {})("mine")', REFUSED),
    "generator-exit": ("raise GeneratorExit", REFUSED),
    "changes-arguments": ("prompts.clear(); completions[:] = ['x']; return [1.0] * 4", SOUND),
    "prints": ('print("hello"); return [1.0] * len(completions)', RUNS),
    "slow": ("import time; time.sleep(1); return [1.0] * len(completions)", RUNS),
}
_SIGNATURES = {
    "nothing": "def reward():\n    return []\n",
    "one": "def reward(completions):\n    return [1.0] * len(completions)\n",
    "three": "def reward(prompts, completions, judge):\n    return [1.0] * len(completions)\n",
    "keyword-missing": "def reward(prompts, completions, *, gold):\n    return [1.0] * len(completions)\n",
    "keyword-only": "def reward(*, prompts, completions):\n    return [1.0] * len(completions)\n",
    "swapped": "def reward(completions, prompts):\n    return [1.0] * len(completions)\n",
    "class": "class reward:\n    def __init__(self, a):\n        pass\n",
    "number": "reward = 3\n",
    "module": "import math as reward\n",
    "gone": "def rewrad(prompts, completions):\n    return [1.0] * len(completions)\n",
    "type": "reward = int\n",
    "builtin": "reward = print\n",
    "coroutine-raises": "async def reward(prompts, completions):\n    raise ValueError('late')\n",
    "coroutine-exits": "async def reward(prompts, completions):\n    raise SystemExit(0)\n",
    "coroutine-cancelled": (
        "import asyncio\nasync def reward(prompts, completions):\n    raise asyncio.CancelledError\n"
    ),
    "coroutine-timeout": (
        "import asyncio\nasync def reward(prompts, completions):\n    await asyncio.wait_for(asyncio.sleep(9), 0.01)\n"
    ),
    "async-generator": "async def reward(prompts, completions):\n    yield 1.0\n",
    "generator": "def reward(prompts, completions):\n    yield 1.0\n",
}
_FILES = {
    "empty": "",
    "syntax": "def reward(:\n",
    "raises": "1 / 0\n",
    "exit-0": "import sys\nsys.exit(0)\n",
    "exit-text": 'raise SystemExit("bye")\n',
    "own-base": "raise type('Own', (BaseException,), {})('mine')\n",
    "import-missing": "import no_such_module\n",
    "nul": "x = 1\0\n",
    "recursion": "f = lambda: f()\nf()\n",
    "import-itself": "import r\ndef reward(prompts, completions):\n    return r.x\n",
    "surrogate": "# \ud83d\n",
    "interrupts": "raise GeneratorExit\n",
}


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `rewards`."""
    return [*_functions(rng), *_names(), *_models()]


def _case(name, text, expect, words=(), dry=False):
    def make(place):
        (place.here / "r.py").write_bytes(text.encode("utf-8", "surrogatepass"))
        return train(place, "ppo", "c.rewards.function = 'r.py:reward'", dry=dry)

    return Case("rewards", name, make, expect, words)


def _functions(rng):
    head = "def reward(prompts, completions):\n    "
    for name, (body, expect) in _BODIES.items():
        words = ("reward",) if expect == REFUSED and name != "memory" else ()
        yield _case(f"gives-{name}", f"{head}{body}\n", expect, words)
        if rng.random() < 0.25:
            yield _case(f"awaited-{name}", f"async {head}{body.replace('reward(', 'await reward(')}\n", expect, words)
    for name, text in _SIGNATURES.items():
        expect = SOUND if name == "swapped" else REFUSED
        yield _case(f"signature-{name}", text, expect, ("reward",) if expect == REFUSED else ())
        if not name.startswith("coroutine") and name not in ("async-generator", "generator", "swapped"):
            told = name != "builtin"  # it does not say what it takes
            yield _case(f"signature-{name}-dry", text, REFUSED if told else SOUND, ("reward",), dry=True)
    for name, text in _FILES.items():
        yield _case(f"file-{name}", text, REFUSED, ("r.py",))
    later = "def reward(prompts, completions, step):\n    return [{}] * len(completions)\n"
    yield _case("later-nan", later.format('float("nan") if step else 1.0'), REFUSED, ("reward",))
    yield _case("later-none", later.format("None if step else 1.0"), REFUSED)


def _names():
    def case(name, value, prepare=lambda p: None, words=()):
        def make(place):
            prepare(place)
            return train(place, "ppo", f"c.rewards.function = {value!r}", dry=True)

        return Case("rewards", f"name-{name}", make, REFUSED, words, limit=30.0)

    yield case("no-colon", "r.py", words=("rewards.function",))
    yield case("colon-only", ":", words=("rewards.function",))
    yield case("no-function", "r.py:", words=("rewards.function",))
    yield case("no-file", "gone.py:reward", words=("gone.py",))
    yield case("no-module", "nosuchmodule:reward", words=("nosuchmodule",))
    yield case("no-package", "no.such.module:reward", words=("no.such.module",))
    yield case("relative", "..x:reward")
    yield case("dots", "...:reward")
    yield case("spaces", "a b:reward")
    yield case("nul", "a\0b:reward")
    yield case("dotted-function", "math:fsum.x")
    yield case("not-callable", "math:pi", words=("pi",))
    yield case("module-number", "math:e", words=("e",))
    yield case("directory", "d.py:reward", lambda p: (p.here / "d.py").mkdir())
    yield case("fifo", "f.py:reward", lambda p: __import__("os").mkfifo(p.here / "f.py"))
    yield case("loop", "l.py:reward", lambda p: (p.here / "l.py").symlink_to("l.py"))
    yield case("device", "z.py:reward", lambda p: (p.here / "z.py").symlink_to("/dev/zero"))
    yield case("long", "x" * 1500 + ".py:reward")
    yield case("url", "https://localhost:1/r.py:reward")


def _models():
    def case(name, prepare, expect=REFUSED, words=("rewards.model",), lines=()):
        def make(place):
            m = copied(place, "model-rm")
            prepare(m)
            return train(place, "ppo", "c.rewards.function = None", "c.rewards.model = 'm'", *lines)

        return Case("rewards", f"model-{name}", make, expect, words)

    import numpy as np

    score = "score.weight"
    yield case("whole", lambda m: None, RUNS)
    yield case("no-config", lambda m: (m / "config.json").unlink())
    yield case("no-weights", lambda m: (m / "model.safetensors").unlink())
    yield case("no-tokenizer", lambda m: (m / "tokenizer.json").unlink())
    yield case("two-labels", lambda m: changed(m / "config.json", id2label={"0": "a", "1": "b"}))
    yield case("no-head", lambda m: edit(m, lambda t: {k: v for k, v in t.items() if k != score}), words=(score,))
    wide = lambda m: edit(m, lambda t: {**t, score: np.ones((2, 16), np.float32)})  # noqa: E731
    yield case("wide-head", wide, words=(score,))
    yield case("nan-head", lambda m: edit(m, lambda t: {**t, score: t[score] * np.nan}), words=(score,))
    yield case("inf-head", lambda m: edit(m, lambda t: {**t, score: t[score] * np.inf}), words=(score,))
    yield case("huge-head", lambda m: edit(m, lambda t: {**t, score: t[score] * 0 + 3e38}), SOUND, ())
    yield case("is-lm", lambda m: changed(m / "config.json", architectures=["LlamaForCausalLM"]))
    yield case("other-family", lambda m: changed(m / "config.json", model_type="gpt2"))
    yield case("is-value-too", lambda m: None, SOUND, (), ("c.algorithm.value_path = 'm'",))
    yield case("short-positions", lambda m: changed(m / "config.json", max_position_embeddings=4), SOUND, ())
    yield case("small-vocabulary", lambda m: changed(m / "config.json", vocab_size=64))

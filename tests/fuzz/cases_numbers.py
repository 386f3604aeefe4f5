"""What a plan computes: texts of programs that are cut or mixed up, and numbers that must agree with each other.

Programs are compiled for this machine's CPU, and predicted as if it were another one.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import time
import types
from unittest import mock

from tests.fuzz.case import SOUND, Case, Outcome
from tests.fuzz.cases_plan import complaint
from tests.fuzz.world import config_text

_FASTER = ("flops", "bandwidth", "link", "network", "efficiency", "memory_efficiency", "link_efficiency")
_FASTER += ("attention_efficiency", "float32_speed")
_SLOWER = ("launch", "latency")


def cases(rng: random.Random) -> list[Case]:
    """The cases of the groups `hlo`, `predict` and `numbers`."""
    texts = [_case("hlo", f"{kind}-{i}", make, rng) for kind, make in _TEXTS.items() for i in range(4)]
    arithmetic = {"timed": _timed, "ranked": _ranked}
    given = [_case("predict", f"{name}-{i}", make, rng) for name, make in arithmetic.items() for i in range(10)]
    algorithms = ("sft", "dpo", "sft", "reward", "sft", "dpo", "ppo", "sft")
    plans = [_case("numbers", f"{name}-{i}", _planned, rng, name, limit=300.0) for i, name in enumerate(algorithms)]
    return [*texts, *given, *plans]


def _case(group, name, found, rng, *given, limit=60.0) -> Case:
    """A case whose function says what is wrong; its random numbers are its own."""
    seed = rng.random()

    def make(place):
        started = time.monotonic()
        words = found(place, random.Random(seed), *given)
        return Outcome(0, "", time.monotonic() - started, "", words)

    return Case(group, name, make, SOUND, limit=limit)


def _program() -> str:
    """A program with a loop, a fusion, calls and products."""
    import jax
    import jax.numpy as jnp

    def loss(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.max()), x, w)[0].sum()

    w, x = jnp.ones((3, 8, 8)), jnp.ones((4, 8))
    return jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()


def _cut(text, rng):
    return text[: rng.randrange(len(text))]


def _beheaded(text, rng):
    return text[rng.randrange(len(text)) :]


def _without_lines(text, rng):
    lines = text.splitlines()
    gone = {rng.randrange(len(lines)) for _ in range(rng.randint(1, 8))}
    return "\n".join(line for i, line in enumerate(lines) if i not in gone)


def _mixed(text, rng):
    lines = text.splitlines()
    for _ in range(rng.randint(1, 6)):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    return "\n".join(lines)


def _renamed(text, rng):
    """Operands that are others': of themselves, of what comes later, of nothing."""
    names = sorted(set(re.findall(r"%[\w.\-]+", text)))
    for _ in range(rng.randint(1, 5)):
        at = [m.span() for m in re.finditer(r"%[\w.\-]+", text)]
        begin, end = rng.choice(at)
        text = text[:begin] + rng.choice([*names, "%nothing"]) + text[end:]
    return text


def _characters(text, rng):
    found = list(text)
    for _ in range(rng.randint(1, 30)):
        found[rng.randrange(len(found))] = rng.choice('{}()[]%=,x9- \n"<>é\0')
    return "".join(found)


def _nonsense(text, rng):
    """Lines that look like a program's."""
    words = re.findall(r"\S+", text)
    lines = ["HloModule m"]
    for _ in range(rng.randint(1, 60)):
        some = " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        lines.append(rng.choice(("  %a = ", "  ROOT %b = ", "ENTRY %main () -> f32[] {", "}", "  ", "")) + some)
    return "\n".join(lines)


def _read(change, whole):
    """Reads changed texts: an account, or a ValueError that says what is wrong."""

    def found(place, rng):
        from jaxalign.plan.account import account
        from jaxalign.plan.hlo import parse

        text = _program()
        account(text)
        for _ in range(25):
            changed = change(text, rng)
            try:
                (account if whole else parse)(changed)
            except ValueError as error:
                if not str(error).strip():
                    return "an error without a word"
        return ""

    return found


_TEXTS = {
    "cut": _read(_cut, True),
    "beheaded": _read(_beheaded, True),
    "without-lines": _read(_without_lines, True),
    "mixed": _read(_mixed, True),
    "renamed": _read(_renamed, False),
    "characters": _read(_characters, False),
    "nonsense": _read(_nonsense, False),
}


def _machine(rng, on=None):
    """A machine's numbers and devices, as a compiler would give them."""
    from jaxalign.parallel.hardware import read_machines

    name = on or rng.choice([n for n, m in read_machines().items() if m.platform])
    machine, device = read_machines()[name], types.SimpleNamespace
    if machine.platform == "gpu":
        return machine, [device(id=i, slice_index=i // 4) for i in range(rng.choice((1, 2, 8, 16)))]
    sides = [rng.choice((1, 2, 4)) for _ in range(machine.axes)]
    places = [()]
    for side in sides:
        places = [(*p, i) for p in places for i in range(side)]
    return machine, [device(id=i, slice_index=0, coords=p) for i, p in enumerate(places)]


def _changed(rng, values):
    """A name, and lines of two assumptions in which it is better and worse."""
    name = rng.choice((*_FASTER, *_SLOWER))
    factor = rng.choice((1.0, 1.5, 10.0, 1e3))
    now = values[name] or 1e-6
    return name, (now / factor, now) if name in _SLOWER else (now, now / factor)


def _account(rng, devices):
    """What a program might do."""
    from jaxalign.plan.account import Account, Product
    from jaxalign.plan.collectives import Collective, Stretch

    dtypes, kinds = ("bf16", "f32", "s8", "f64"), ("dot", "attention")
    work = [Stretch(i, 10 ** rng.uniform(0, 13), rng.randrange(10**9)) for i in range(8)]
    # Each stretch is a product and some traffic beside it; others are in no stretch.
    sizes = [w.flops for w in work] + [10 ** rng.uniform(0, 15) for _ in range(rng.randint(0, 6))]
    inside = [rng.randrange(int(w.bytes) + 1) for w in work] + [rng.randrange(10**10) for _ in sizes[len(work) :]]
    products = tuple(
        Product("p", (rng.choice(dtypes),) * 2, "f32", flops, 1, "", moved, rng.choice(kinds))
        for flops, moved in zip(sizes, inside, strict=True)
    )
    beside = sum(w.bytes - moved for w, moved in zip(work, inside, strict=False))
    collectives, count = [], len(devices)
    for _ in range(rng.randint(0, 8)):
        size = rng.choice([n for n in (1, 2, 4, 8, 16, 64) if count % n == 0])
        order = rng.sample(range(count), count)
        groups = tuple(tuple(order[j : j + size]) for j in range(0, count, size))
        begin = rng.randrange(8)
        kind = rng.choice(("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"))
        between = tuple(work[begin : rng.randint(begin, 8)])
        collectives.append(
            Collective(kind, "bf16", rng.randrange(10**10), size, groups, 1, "", rng.random() < 0.6,
                       between, "")
        )  # fmt: skip
    traffic, kernels = beside + rng.randrange(10**12), rng.randint(0, 10**5)
    return Account(products, tuple(collectives), traffic, 0.0, 0.0, kernels, (), (), count, {}, (), (), 0.5)


def _timed(place, rng):
    """Seconds are finite, parts of a whole, and fall where the machine is faster."""
    from jaxalign.plan.predict import alone_and_hidden, assumptions, predict

    for _ in range(40):
        machine, devices = _machine(rng)
        values = assumptions(machine).values
        counted = _account(rng, devices)
        name, (better, worse) = _changed(rng, values)
        fast, slow = (assumptions(machine, [f"{name}={value!r}"]) for value in (better, worse))
        one, other = (predict(counted, assumed, devices) for assumed in (fast, slow))
        for found in (one, other):
            if not all(math.isfinite(x) and x >= 0 for x in (*found, found.total)):
                return f"{found} at {name}"
        alone = alone_and_hidden(counted, fast, devices)
        if any(not 0 <= hidden <= seconds * (1 + 1e-9) for _, seconds, hidden in alone):
            return f"more is hidden than there is: {alone}"
        whole = sum(c.times * seconds for c, seconds, _ in alone)
        if not math.isclose(one.collectives + one.hidden, whole, rel_tol=1e-9, abs_tol=1e-12):
            return f"collectives take {whole} s, shown {one.collectives}, hidden {one.hidden}"
        # A faster device has less to hide collectives behind: what they need and it computes never rises in sum.
        if one.total > other.total * (1 + 1e-9):
            return f"{name}: {one.total} s with {better}, {other.total} s with {worse}: {one} {other}"
    return ""


def _ranked(place, rng):
    """The search's arithmetic: finite, of all sizes, and nothing that fits a pool is missing from a larger one."""
    from jaxalign.config import defaults
    from jaxalign.plan.predict import assumptions
    from jaxalign.plan.search import Sizes, candidates, nothing_fits

    for _ in range(12):
        machine, _ = _machine(rng)
        devices, params = rng.choice((1, 2, 3, 6, 8, 12, 64)), 10 ** rng.uniform(2, 12)
        kv = rng.choice((1, 2, 3, 4, 7, 8))
        minibatches = rng.choice((1, 1, 3))
        s = Sizes(
            params=params, state=params * rng.uniform(2, 16), frozen=params * rng.choice((0, 2)),
            layers=rng.randint(1, 80), embed=rng.choice((16, 100, 4096)), mlp=rng.choice((24, 14336)),
            heads=kv * rng.randint(1, 4), kv_heads=kv, head_dim=rng.choice((8, 128)), vocab=rng.choice((7, 448)),
            length=rng.choice((1, 40, 8192)), batch=rng.choice((1, 3, 8, 96)), minibatches=minibatches, passes=3.0,
        )  # fmt: skip
        c = defaults("sft")
        c.batch_size = s.batch
        slices = rng.choice([n for n in (1, 2) if devices % n == 0])
        pools = sorted(rng.uniform(1e-6, 1.0) for _ in range(2))
        small, large = (assumptions(machine, [f"pool={pool!r}"]) for pool in pools)
        few, many = (candidates(s, c, devices, slices, assumed) for assumed in (small, large))
        for one in (*few, *many):
            if not (math.isfinite(one.memory) and one.memory > 0 and math.isfinite(one.seconds) and one.seconds > 0):
                return f"{one} of {s}"
            if one.data * one.fsdp * one.tensor != devices or one.batch % (one.data * one.fsdp * one.accumulation):
                return f"{one} on {devices} devices"
        if missing := set(few) - set(many):
            return f"fits {pools[0]} of the memory, not {pools[1]}: {missing}"
        error = nothing_fits(s, devices, small)
        if re.search(r"\b(nan|inf)\b", f"{error}") or "-" in error.found.split("GiB")[0]:
            return str(error)
    return ""


def _model(place, rng):
    """A model's directory whose sizes nothing divides."""
    kv = rng.choice((1, 1, 2, 3))
    heads = kv * rng.randint(1, 3)
    shape = {
        "num_hidden_layers": rng.randint(1, 3),
        "num_key_value_heads": kv,
        "num_attention_heads": heads,
        "head_dim": rng.choice((2, 6, 8)),
        "hidden_size": heads * rng.choice((2, 5, 8)),
        "intermediate_size": rng.choice((1, 7, 24)),
        "tie_word_embeddings": rng.random() < 0.5,
    }
    shutil.copytree(place.world / "model", place.here / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    file = json.loads((place.here / "m/config.json").read_text())
    vocab = file["vocab_size"] + rng.choice((0, 1, 13))
    (place.here / "m/config.json").write_text(json.dumps(file | shape | {"vocab_size": vocab}))


def _config(place, rng, algorithm):
    """A small configuration that can be."""
    from jaxalign.pipeline.configfile import load_config

    accumulation, minibatches = rng.choice((1, 1, 2, 3)), rng.choice((1, 2)) if algorithm == "ppo" else 1
    length = rng.choice((41, 64))
    lines = [
        "c.model.path = 'm'",
        f"c.batch_size = {accumulation * minibatches * rng.choice((1, 2, 3))}",
        f"c.grad_accum_steps = {accumulation}",
        f"c.model.remat = {rng.choice(('none', 'dots', 'attention', 'full', 'auto'))!r}",
        f"c.model.dtype = {rng.choice(('float32', 'bfloat16'))!r}",
        f"c.optimizer.state_dtype = {rng.choice((None, 'bfloat16', 'int8'))!r}",
        f"c.data.max_length = {length}",
    ]
    if algorithm == "ppo":
        lines += [f"c.algorithm.num_minibatches = {minibatches}"]
    else:
        lines += [f"c.data.row_length = {2 * length}", f"c.data.packing = {rng.random() < 0.5 and algorithm == 'sft'}"]
    (place.here / "config.py").write_text(config_text(place.world, algorithm, *lines))
    return load_config("config.py", [])


def _planned(place, rng, algorithm):
    """A plan of a random configuration: its numbers agree, and a better machine is never worse."""
    import jax

    from jaxalign.parallel.hardware import read_machines
    from jaxalign.plan import described
    from jaxalign.plan.plan import stage_configs
    from jaxalign.plan.predict import assumptions

    _model(place, rng)
    config = stage_configs(_config(place, rng, algorithm))[""]
    machine, devices = read_machines()["h100"], jax.devices()[:1]
    compile_all, kept = described.programs, []

    def programs(stage, **options):
        kept[:] = kept or list(compile_all(stage, **options))
        return kept

    def planned(*given):
        assumed = assumptions(machine, given)
        with mock.patch.object(described, "programs", programs):
            stage = described.plan_stage(config, devices, assumed, lambda text: None)
        pool = int(machine.memory * assumed.values["pool"])
        whole = {"name": "cpu", "kind": "cpu", "platform": "gpu", "devices": 1, "memory": machine.memory, "pool": pool}
        found = {"machine": whole, "assumptions": dict(assumed.values), "stages": {"": stage}}
        found = json.loads(json.dumps(found, allow_nan=False))
        return stage, complaint(found)

    _, words = planned()
    if words:
        return words
    for _ in range(3):
        name, (better, worse) = _changed(rng, assumptions(machine).values)
        pools = sorted(rng.uniform(1e-7, 1.0) for _ in range(2))
        good, one = planned(f"{name}={better!r}", f"pool={pools[1]!r}")
        bad, other = planned(f"{name}={worse!r}", f"pool={pools[0]!r}")
        if one or other:
            return one or other
        if good["iteration"]["seconds"] > bad["iteration"]["seconds"] * (1 + 1e-9):
            return f"{name} {better}: {good['iteration']}, {worse}: {bad['iteration']}"
        for p, q in zip(good["programs"], bad["programs"], strict=True):
            if q["fits"] and not p["fits"]:
                return f"{p['name']} fits {pools[0]} of the memory, not {pools[1]}"
            if p["memory"] | {"pool": 0} != q["memory"] | {"pool": 0}:
                return f"{p['name']}: its memory hangs on how fast the machine is"
    return ""

"""The page of a plan, its losses, and the arithmetic of a search, from numbers made by hand."""

import pytest

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.parallel.hardware import read_machines
from jaxalign.plan.losses import losses_of
from jaxalign.plan.predict import assumptions
from jaxalign.plan.report import as_text, search_text
from jaxalign.plan.search import AS_IS, Sizes, candidates, memory_of, nothing_fits

ASSUMED = assumptions(read_machines()["h200"], ["efficiency=0.5", "memory_efficiency=1"])
GIB = 2**30


def program(name="train step", times=1.0, **changed):
    exposed = {"all-gather": 0.2, "all-reduce": 0.1}
    made = {
        "name": name,
        "times": times,
        "tokens": 1000.0,
        "fill": 1.0,
        "memory": {"policy params": 4 * GIB, "temporary": 8 * GIB, "peak": 12 * GIB, "pool": 100 * GIB},
        "fits": True,
        "largest": [{"array": "f32[8]", "bytes": GIB, "of": "x"}],
        "flops": {"model": 494.5e12, "products": 2 * 494.5e12, "attention": 0.0, "other_dtype": 0.0},
        "collectives": [
            {"kind": kind, "dtype": "bf16", "loop": "while", "asynchronous": kind != "all-reduce", "group": 8,
             "count": 3, "bytes": 2e9, "seconds": 0.3, "exposed": shown} for kind, shown in exposed.items()
        ],
        "resharding_bytes": 0,
        "traffic_bytes": 48e9,
        "traffic": [{"kernel": "jit(step)/mul", "count": 32, "bytes": 2e10}],
        "kernels": 100,
        "seconds": {"products": 2.0, "traffic": 0.01, "collectives": 0.3, "gaps": 0.001, "hidden": 0.1, "total": 2.311},
        "mfu": 0.216,
    }  # fmt: skip
    return made | changed


def config(**fields):
    c = defaults("sft")
    for field, value in fields.items():
        c[field] = value
    return c


def test_losses_by_cause_the_largest_first():
    found = losses_of([program()], config(grad_accum_steps=4), {"tensor": 2}, ASSUMED)
    assert [one["seconds"] for one in found] == sorted((one["seconds"] for one in found), reverse=True)
    by_what = {one["what"]: one for one in found}
    again = by_what["what the backward pass computes again"]
    assert again["seconds"] == pytest.approx(1.0)
    assert "remat=dots" in again["change"]
    assert by_what["all-gather that nothing hides"]["change"].startswith("--config.grad_accum_steps=2")
    assert "mesh.tensor=1" in by_what["all-reduce that nothing hides"]["change"]
    # Together they are all that a step takes above the model's FLOPs at the peak.
    assert sum(one["seconds"] for one in found) == pytest.approx(2.311 - 0.5)


def test_padding_is_a_loss_of_its_own():
    c = config()
    c.data.packing = False
    found = {one["what"]: one for one in losses_of([program(fill=0.8)], c, {}, ASSUMED)}
    assert found["padding: 20% of the rows"]["seconds"] == pytest.approx(0.25)
    assert "packing" in found["padding: 20% of the rows"]["change"]
    assert found["what the backward pass computes again"]["seconds"] == pytest.approx(0.75)


def test_a_loss_counts_as_often_as_its_program_runs():
    four = losses_of([program(times=4.0)], config(), {}, ASSUMED)
    once = losses_of([program()], config(), {}, ASSUMED)
    assert [one["seconds"] for one in four] == pytest.approx([4 * one["seconds"] for one in once])


RUN = {
    "steps": 300, "evaluations": 6, "evaluation_batches": 2, "reference_batches": 0, "device_hours": 4.0, "price": 8.0,
    "seconds": {"steps": 1700.0, "evaluations": 100.0, "reference pass": 0.0, "total": 1800.0}, "not_counted": [],
}  # fmt: skip


def stage_of(algorithm="ppo", run=RUN, **changed):
    step = program(fits=False)
    decode = program("decode", 256.0, decoding={"bytes_per_token": 3e9, "weights": 3e9, "cache": 1e9, "columns": 768})
    return {
        "algorithm": algorithm,
        "fits": False,
        "run": run,
        "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
        "settings": {"batch_size": 64, "grad_accum_steps": 2, "remat": "full", "row_length": 4096, "dtype": "bfloat16"},
        "assumed": ["data: x is not here: full rows of 4,096 tokens are assumed"],
        "warnings": ["a batch has 64 rows and the data fill only 8"],
        "programs": [step, decode] if algorithm == "ppo" else [step],
        "iteration": {"seconds": 2.3, "mfu": 0.2, "tokens_per_second": 4e5, "tokens_per_second_per_device": 5e4},
        "losses": losses_of([step], config(), {}, ASSUMED),
    } | changed


MACHINE = {"name": "gpu:h200:1x8x1", "kind": "NVIDIA H200", "platform": "gpu", "devices": 8, "memory": 140 * GIB}
MACHINE |= {"pool": 105 * GIB}


def page(details=False, **stages):
    return as_text({"machine": MACHINE, "stages": stages}, ASSUMED, details=details)


def test_the_page():
    text = page(True, rl=stage_of(), sft=stage_of("sft"))
    for part in (
        "8 x NVIDIA H200", "105.0", "XLA_PYTHON_CLIENT_MEM_FRACTION", "stage rl: ppo", "fsdp=8", "DOES NOT FIT",
        "full rows of 4,096", "2.00x", "21.6%", "async", "largest losses", "3.00 GB", "efficiency=0.5",
        "768 columns", "the data fill only 8",
    ):  # fmt: skip
        assert part in text, part
    assert all(len(line) <= 120 for line in text.splitlines())


def test_without_details_the_answer_what_does_not_fit_losses_and_warnings():
    text, whole = (page(details, rl=stage_of(), sft=stage_of("sft", fits=True)) for details in (False, True))
    parts = (
        "DOES NOT FIT",
        "remat",
        "the data fill only 8",
        "full rows of 4,096",
        "losses",
        "efficiency=0.5",
        "--details",
    )
    for part in parts:
        assert part in text, part
    assert "--details" in text
    for part in ("collectives of one run", "traffic of the", "of model", "of little weight"):
        assert part in whole and part not in text, part
    assert text.count("decode") < whole.count("decode")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_small_pool_is_not_shown_as_none():
    text = as_text({"machine": MACHINE | {"pool": 2**20}, "stages": {"sft": stage_of("sft")}}, ASSUMED)
    assert "may use 0.00098" in text and "of 0.00098" in text


def test_the_answer_stands_on_top():
    """Each stage in one line: whether it fits, a step, MFU, the run, device-hours, price."""
    lines = page(rl=stage_of(), sft=stage_of("sft", fits=True)).splitlines()
    head = next(i for i, line in enumerate(lines) if "device-hours" in line)
    assert head < 4
    rl, sft = (line.split() for line in lines[head + 1 : head + 3])
    assert rl[:2] == ["rl", "NO"] and sft[:2] == ["sft", "yes"]
    assert sft[-3:] == ["min", "4", "8.00"] and "2.30" in sft and "20.0%" in sft and "300" in sft
    assert any("6 evaluations of 2 batches" in line for line in lines[:10])


def test_a_run_of_unknown_length_tells_what_a_thousand_steps_take():
    unknown = RUN | {"steps": None, "seconds": None, "device_hours": None, "price": None, "not_counted": ["unknown"]}
    text = page(sft=stage_of("sft", unknown))
    assert "1,000 take 38.3 min, 5.11 device-hours" in text and "price=0" not in text
    priced = assumptions(read_machines()["h200"], ["price=3"])
    text = as_text({"machine": MACHINE, "stages": {"sft": stage_of("sft", unknown)}}, priced)
    assert "5.11 device-hours, a price of 15.33" in " ".join(text.split())
    assert "?" in text.splitlines()[4]


def test_a_stage_that_the_compiler_cannot_fit_is_one_line():
    run = RUN | {"steps": None, "seconds": None, "price": None, "not_counted": ["out of memory in the train step"]}
    text = page(rl={"algorithm": "ppo", "fits": False, "run": run, "programs": []}, sft=stage_of("sft"))
    assert "rl: out of memory" in text
    assert text.count("stage rl") == 0


def test_what_weighs_little_is_named_in_short():
    lines = page(True, sft=stage_of("sft")).splitlines()
    assert any(line.startswith("  link=") for line in lines)
    assert not any(line.startswith("  network=") for line in lines)
    assert any("of little weight" in line for line in lines)
    assert "network=5e+10" in " ".join(lines)


def test_a_change_of_the_optimisation_is_said():
    c = config(batch_size=8)
    c.data.packing = False
    found = losses_of([program(fill=0.8)], c, {}, ASSUMED)
    said = {one["change"].partition("=")[0]: one["changes_optimisation"] for one in found if one["change"]}
    assert said["--config.batch_size"] and said["--config.data.packing"] and not said["--config.model.remat"]
    assert "changes the optimisation" in page(
        sft=stage_of("sft", losses=[one for one in found if "packing" in one["change"]])
    )


SIZES = Sizes(8e9, 96e9, 0.0, 32, 4096, 14336, 32, 8, 128, 128_256, 4096, 64, 1, 3.0)


def test_what_is_estimated_to_fit_divides_and_fits():
    found = candidates(SIZES, config(batch_size=64), 8, 1, ASSUMED)
    pool = ASSUMED.machine.memory * ASSUMED.values["pool"]
    assert found
    for one in found:
        assert one.data * one.fsdp * one.tensor == 8
        assert one.batch % (one.data * one.fsdp * one.accumulation) == 0
        assert one.memory <= 1.15 * pool
        assert f"--config.model.remat={one.remat}" in one.lines()
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)


def test_the_arithmetic_follows_what_saves_memory():
    one = candidates(SIZES, config(batch_size=64), 8, 1, ASSUMED)[0]._replace(
        data=1, fsdp=8, tensor=1, remat="full", accumulation=2, batch=64
    )
    base = memory_of(one, SIZES)
    assert memory_of(one._replace(remat="dots"), SIZES) > base
    assert memory_of(one._replace(accumulation=4), SIZES) < base
    assert memory_of(one._replace(data=8, fsdp=1), SIZES) > base
    measured = SIZES._replace(temporary=2e9, estimated=1e9)
    assert memory_of(one, measured) > base


def test_nothing_fits_says_how_many_devices_would():
    large = SIZES._replace(params=400e9, state=4800e9)
    assert candidates(large, config(batch_size=64), 8, 1, ASSUMED) == []
    error = nothing_fits(large, 8, ASSUMED)
    assert isinstance(error, InputError)
    assert "128 such devices" in error.fix and "frozen_dtype" not in error.fix
    assert "frozen_dtype" in nothing_fits(large._replace(frozen=800e9), 8, ASSUMED).fix


def test_a_search_as_config_lines():
    found = {
        "estimated": 9,
        "compiled": 2,
        "found": [
            {"lines": "--config.a=1", "tokens_per_second": 1e5, "mfu": 0.5, "peak": GIB},
            {"lines": "--config.a=2", "tokens_per_second": 2e5, "mfu": 0.5, "peak": GIB, "changes_optimisation": True},
        ],
    }
    text = search_text("", found, 2 * GIB)
    assert "9 combinations" in text
    assert text.index("--config.a=1") < text.index("changes the optimisation") < text.index("--config.a=2")


def test_a_batch_divides_as_training_wants_it():
    """Of PPO each prompt's two completions are rows of training, but the prompts are what is divided."""
    two = SIZES._replace(batch=128, minibatches=4)
    found = candidates(two, config(batch_size=64), 8, 1, ASSUMED)
    assert found
    assert all(one.batch % (one.data * one.fsdp * one.accumulation * 4) == 0 for one in found)


def test_what_training_refuses_does_not_end_a_search(monkeypatch):
    from jaxalign.plan import search as searching

    def planned(c, *_, **__):
        if c.model.remat == "none":
            raise InputError("refused", "another", "--config.model.remat=full")
        step = {"name": "train step", "fits": True, "seconds": {"total": 2.0}, "mfu": 0.5, "memory": {"peak": GIB}}
        return {"programs": [step], "iteration": {"tokens": 4000.0}}

    first = candidates(SIZES, config(batch_size=64), 8, 1, ASSUMED)[0]._replace(batch=64)
    found = [first._replace(batch=128, remat="dots"), first._replace(remat="none"), first._replace(remat="full")]
    monkeypatch.setattr(searching, "_sizes", lambda *_: (SIZES, 1))
    monkeypatch.setattr(searching, "candidates", lambda *_: found)
    monkeypatch.setattr(searching, "plan_stage", planned)
    told = []
    result = searching.search(config(batch_size=64), [None] * 8, ASSUMED, 3, told.append)
    assert [one["tokens_per_second"] for one in result["found"]] == [2000.0, 2000.0]
    assert [one["changes_optimisation"] for one in result["found"]] == [False, True]
    assert any("refused" in text for text in told)


@pytest.fixture
def searched(monkeypatch):
    """A search among given candidates of which those of too many bytes do not fit; what was compiled."""
    from jaxalign.plan import search as searching

    def search(found, most, fits, planned=None):
        compiled, told = [], []

        def plan_stage(c, *_, **__):
            compiled.append((c.model.remat, c.grad_accum_steps))
            step = {"name": "train step", "fits": fits(c), "seconds": {"total": 2.0}, "mfu": 0.5}
            return {"programs": [step | {"memory": {"peak": GIB}}], "iteration": {"tokens": 4000.0}}

        monkeypatch.setattr(searching, "_sizes", lambda *_: (SIZES, 1))
        monkeypatch.setattr(searching, "candidates", lambda *_: found)
        monkeypatch.setattr(searching, "plan_stage", plan_stage)
        c = config(batch_size=64)
        return searching.search(c, [None] * 8, ASSUMED, most, told.append, planned), compiled, told

    return search


def test_what_takes_more_than_what_did_not_fit_is_not_compiled(searched):
    first = candidates(SIZES, config(batch_size=64), 8, 1, ASSUMED)[0]._replace(data=1, fsdp=8, tensor=1, batch=64)
    found = [first._replace(remat="dots", accumulation=n, memory=1e9 * m) for n, m in ((2, 40), (1, 60), (4, 20))]
    result, compiled, told = searched(found, 6, lambda c: c.grad_accum_steps > 2)
    assert compiled == [("dots", 2), ("dots", 4)]
    assert [one["lines"] for one in result["found"]] == ["--config.model.remat=dots --config.grad_accum_steps=4"]
    assert any("does not fit" in text for text in told)


def test_a_mesh_that_did_not_fit_does_not_speak_for_another_of_about_as_much(searched):
    first = candidates(SIZES, config(batch_size=64), 8, 1, ASSUMED)[0]._replace(batch=64, remat="dots", accumulation=1)
    found = [
        first._replace(data=data, fsdp=8 // data, tensor=1, memory=1e9 * m) for data, m in ((1, 40), (2, 44), (4, 50))
    ]
    result, compiled, _ = searched(found, 6, lambda c: c.mesh.data == 2)
    assert len(compiled) == 2  # that of 50 is above 1.15 x 40
    assert len(result["found"]) == 1 and "--config.mesh.data=2" in result["found"][0]["lines"]


def test_what_is_configured_stands_among_what_was_found_and_is_not_compiled_again(searched):
    first = candidates(SIZES, config(batch_size=64), 8, 1, ASSUMED)[0]._replace(data=1, fsdp=8, tensor=1, batch=64)
    now = first._replace(remat=config().model.remat, accumulation=1)
    step = {"name": "train step", "fits": True, "seconds": {"total": 1.0}, "mfu": 0.5, "memory": {"peak": GIB}}
    planned = {"programs": [step], "iteration": {"tokens": 4000.0}, "settings": {"remat": now.remat}}
    result, compiled, _ = searched([now, now._replace(data=2, fsdp=4)], 1, lambda c: True, planned)
    assert len(compiled) == result["compiled"] == 1
    lines = "--config.mesh.data=2 --config.mesh.fsdp=4 --config.mesh.tensor=1"
    assert [one["lines"] for one in result["found"]] == [AS_IS, lines]


def test_decoding_is_no_loss_of_products():
    decode = program("decode", 256.0, decoding={"bytes_per_token": 5e9, "weights": 3e9, "cache": 1e9, "columns": 768})
    assert not [one for one in losses_of([decode], config(), {}, ASSUMED) if "of the peak" in one["what"]]

"""Several machines for one configuration: their names and numbers, one that it does not suit, and the ranking."""

import json

import pytest

from jaxalign.cli import main
from jaxalign.errors import InputError
from jaxalign.parallel.hardware import read_machines
from jaxalign.plan import compare as comparing
from jaxalign.plan.compare import Wanted, compare, ranking_text, require_one, wanted
from jaxalign.plan.predict import assumptions
from jaxalign.plan.runs import together

GIB = 2**30
MACHINES = read_machines()
A100, H100, H200, V5P = "gpu:a100-80:1x8x1", "gpu:h100:1x8x1", "gpu:h200:1x8x1", "tpu:v5p:2x2x2"


def stage(seconds, steps, price):
    """A stage whose step takes so many seconds; above 9 it does not fit."""
    peak, hours = (200 if seconds > 9 else 60) * GIB, steps and steps * seconds * 8 / 3600
    run = {"steps": steps, "seconds": steps and {"total": steps * seconds}, "device_hours": hours}
    refused = {"problem": "out of memory", "expected": "less"} if seconds == 99 else {}
    return refused | {
        "fits": seconds <= 9,
        "programs": [{"name": "train step", "memory": {"peak": peak, "pool": 100 * GIB}}] * (seconds < 99),
        "iteration": {"seconds": seconds, "mfu": 0.5, "tokens_per_second": 8000 / seconds},
        "run": run | {"price": hours * price if hours and price else None},
        "change": "--config.model.remat=full",
    }


@pytest.fixture
def planned(monkeypatch):
    """Compares machines by the seconds of a step; None: refused as training would refuse it."""
    monkeypatch.setattr(comparing, "absent_devices", lambda *_: [])

    def run(seconds, assume=(), steps=100, stages=("dpo",)):
        def plan(config, topology, *, assume, say, **_):
            if seconds[topology] is None:
                raise InputError("batch_size is 7", "a multiple of 8", "--config.batch_size=8")
            say("compiling")
            assumed = assumptions(MACHINES[topology.split(":")[1]], assume)
            made = {name: stage(seconds[topology], steps, assumed.values["price"]) for name in stages}
            return {
                "fits": {name: each["fits"] for name, each in made.items()},
                "stages": made,
                "together": together([each["run"] for each in made.values()]) if len(made) > 1 else None,
                "machine": {"name": topology, "devices": 8, "pool": 100 * GIB},
                "assumptions": dict(assumed.values),
            }, assumed

        monkeypatch.setattr(comparing, "plan", plan)
        run.said, run.shown = [], []
        asked = wanted(",".join(seconds), assume, MACHINES)
        found = compare(None, MACHINES, asked, say=run.said.append, show=lambda made, _: run.shown.append(made))
        return json.loads(json.dumps(found))

    return run


def order(found):
    return [row["machine"] for row in found["ranking"]]


def test_the_cheapest_first_where_prices_are_known(planned):
    found = planned({A100: 4.0, H100: 2.0, V5P: 3.0}, ["price=2", "h100.price=5", "a100-80.price=1"])
    assert order(found) == [A100, V5P, H100]
    assert found["ranking"][0]["run"]["price"] == pytest.approx(100 * 4 * 8 / 3600)
    lines = ranking_text(found).splitlines()
    assert "price" in lines[0]
    assert [line.split()[:2] for line in lines[3:6]] == [[A100, "yes"], [V5P, "yes"], [H100, "yes"]]
    assert lines[3].split()[-1] == "0.89" and "6.7 min" in lines[3] and "50.0%" in lines[3]
    assert all(len(line) <= 120 for line in lines)


def test_the_fastest_first_where_a_price_is_not_known(planned):
    found = planned({A100: 4.0, H100: 2.0}, ["a100-80.price=1"])
    assert order(found) == [H100, A100]
    text = ranking_text(found)
    assert "by the time" in text and "--assume h100.price=2" in text and "a100-80.price" not in text


def test_a_thousand_steps_where_the_run_is_not_known(planned):
    found = planned({A100: 4.0, H100: 2.0}, ["price=9"], steps=None)
    assert [row["run"]["steps"] for row in found["ranking"]] == [1000, 1000]
    assert found["ranking"][0]["run"]["price"] == pytest.approx(9 * 2000 * 8 / 3600)
    assert "1,000 steps" in ranking_text(found)


def test_stages_together(planned):
    found = planned({A100: 4.0, H100: 2.0}, stages=("sft", "dpo"))
    assert found["ranking"][0]["run"]["seconds"] == 400 and found["ranking"][0]["seconds"] is None
    assert "MFU" not in ranking_text(found)
    unknown = planned({A100: 4.0, H100: 2.0}, stages=("sft", "dpo"), steps=None)
    assert unknown["ranking"][0]["run"]["seconds"] == 4000


def test_what_a_machine_does_not_suit_does_not_stop_the_others(planned):
    found = planned({A100: 12.0, V5P: None, H100: 2.0})
    assert found["fits"] == {A100: False, V5P: False, H100: True} and order(found) == [H100, A100, V5P]
    require_one(found)
    assert [made["machine"]["name"] for made in planned.shown] == [A100, H100]
    assert f"{A100}: compiling" in planned.said
    assert found["machines"][V5P]["fix"] == "--config.batch_size=8"
    text = " ".join(ranking_text(found).split())
    assert "needs 200.00 GiB" in text and "--config.model.remat=full" in text and "batch_size is 7" in text


def test_what_the_compiler_itself_finds_no_room_for(planned):
    text = ranking_text(planned({A100: 99.0, H100: 2.0}))
    assert "above 100.0" in text and f"{A100}: out of memory; --config.model.remat=full" in text


def test_none_does(planned):
    found = planned({A100: 12.0, H100: 12.0})
    assert "NO" in ranking_text(found)
    with pytest.raises(InputError, match=f"{A100}: .*200.00 GiB"):
        require_one(found)
    with pytest.raises(InputError, match="batch_size is 7"):
        planned({A100: None, H100: None})


def test_machines_of_one_peak_differ_by_an_assumption(planned):
    both = {H100: 2.0, H200: 1.9}
    assert "h200 0.8, h100 0.75: shares of the same peak" in ranking_text(planned(both))
    assert "same peak" not in ranking_text(planned(both, ["efficiency=0.75"]))


def test_numbers_of_one_kind_go_before_those_of_all():
    assert wanted(f"{H100}", ["h100.price=2", "price=1"], MACHINES) == [Wanted(H100, ("price=1", "price=2"))]


@pytest.mark.parametrize(
    ("on", "assume", "fix"),
    [
        (f"{H100},gpu:h220:1x8x1", "", f"--on={H100},{H200}"),
        (f"{H100},{V5P},{H100}", "", f"--on={H100},{V5P}"),
        (f"{H100},{V5P}", "h200.price=2", "--assume h100.price=2"),
        (f"{H100},{V5P}", "v5p.prize=2", "--assume v5p.price=2"),
        (f"{H100},{V5P}", "v5p.pool=2", "--assume v5p.pool="),
        (f"{H100},{V5P}", "pool=2", "--assume pool="),
        (f"{H100},{V5P}", "h100.steps=5000", "--assume steps=5000"),
        (f"{H100},{V5P}", "v5p.readouts=0.5", "--assume readouts=0.5"),
    ],
)
def test_all_names_and_numbers_are_checked_before_the_first_is_compiled(on, assume, fix, planned):
    with pytest.raises(InputError) as error:
        wanted(on, [assume] if assume else [], MACHINES)
    assert error.value.fix.startswith(fix)


def test_the_second_machines_shape_is_looked_at_too(monkeypatch):
    def absent_devices(name, _):
        if name == V5P:
            raise InputError("no machine", "a shape", "--on=tpu:v5p:2x2x4")

    monkeypatch.setattr(comparing, "absent_devices", absent_devices)
    with pytest.raises(InputError) as error:
        wanted(f"{H100},{V5P}", [], MACHINES)
    assert error.value.fix == f"--on={H100},tpu:v5p:2x2x4"


@pytest.mark.parametrize(("seconds", "status"), [({A100: 12.0, H100: 2.0}, 0), ({A100: 12.0, H100: 12.0}, 2)])
def test_the_command(seconds, status, planned, shared, tmp_path, capsys, monkeypatch):
    found = planned(seconds)
    monkeypatch.setattr(comparing, "compare", lambda *_, **__: found)
    model, out = shared / "models" / "stories3m-llama", tmp_path / "plan.json"
    assert main(["plan", "sft", f"--model={model}", f"--on={A100},{H100}", f"--json={out}"]) == status
    said = capsys.readouterr()
    assert "--model.remat=full" in said.out and (status == 0 or A100 in said.err)
    assert json.loads(out.read_text()) == found


@pytest.mark.parametrize("on", ["gpu:h101:1x8x1,gpu:h100:1x8x1", f"{H100},", f",{H100}"])
def test_what_mends_a_machines_name_is_no_machine_named_twice_nor_another(on):
    with pytest.raises(InputError) as caught:
        wanted(on, [], read_machines())
    assert caught.value.fix == f"--on={H100}"

"""A plan of several stages as JSON: names, flags and what does not fit; the stages themselves are made by hand."""

import json
import types

import pytest

from jaxalign import __version__
from jaxalign.config import defaults, stages
from jaxalign.errors import InputError
from jaxalign.parallel.hardware import read_machines
from jaxalign.plan import plan as planning
from jaxalign.plan.predict import assumptions
from jaxalign.plan.report import as_text
from jaxalign.plan.runs import Length, run_of

GIB = 2**30


def made(c, fits=True):
    time = {"products": 1.0, "traffic": 0.5, "collectives": 0.0, "hidden": 0.0, "gaps": 0.0, "total": 1.5}
    step = {
        "name": "train step", "times": 1.0, "seconds": time, "fits": fits, "largest": [], "collectives": [],
        "memory": {"temporary": GIB, "peak": (GIB if fits else 200 * GIB), "pool": 100 * GIB}, "traffic": [],
        "flops": {"model": 1e12, "products": 1e12, "attention": 0.0, "other_dtype": 0.0}, "mfu": 0.5,
        "resharding_bytes": 0, "traffic_bytes": 1e9,
    }  # fmt: skip
    change = {"program": "train step", "what": "padding", "seconds": 0.1, "change": "--config.data.packing=True"}
    return {
        "algorithm": c.algorithm.name,
        "fits": fits,
        "run": run_of(Length(100), [step], {"price": 2.0}, 8),
        "mesh": {"fsdp": 8},
        "settings": {"batch_size": 8, "grad_accum_steps": 1, "remat": "full", "row_length": 64},
        "assumed": [],
        "programs": [step],
        "iteration": {"seconds": 1.5, "mfu": 0.5, "tokens_per_second": 1e3},
        "losses": [change | {"changes_optimisation": True}],
    }


@pytest.fixture
def planned(monkeypatch):
    """Plans stages of which those named do not fit, or are refused by the compiler, or are wrong."""
    devices = [types.SimpleNamespace(device_kind="NVIDIA H200", id=i) for i in range(8)]
    monkeypatch.setattr(planning, "absent_devices", lambda *_: devices)
    monkeypatch.setattr(planning, "nearest_that_fits", lambda *_: "--config.model.remat=full")
    monkeypatch.setattr(planning, "adapter_export", lambda *_: None)

    def plan(config, too_large=(), refused=(), wrong=()):
        def plan_stage(c, *_):
            name = c.algorithm.name
            if name in refused:
                raise InputError("out of memory in the train step", "less", "--config.batch_size=1")
            return made(c, name not in too_large)

        def make_stage(c, *_):
            if c.algorithm.name in wrong:
                raise InputError("batch_size is 7", "a multiple of 8", "--config.batch_size=8")
            return None, []

        monkeypatch.setattr(planning, "plan_stage", plan_stage)
        monkeypatch.setattr(planning, "make_stage", make_stage)
        plan.said = []
        found, _ = planning.plan(config, "gpu:h200:1x8x1", say=plan.said.append)
        return json.loads(json.dumps(found))

    return plan


def one(name, **fields):
    c = defaults(name)
    c.workdir, c.model.path, c.data.sources = "w", "owner/m", ("owner/d",)
    for field, value in fields.items():
        c[field] = value
    return c


def both(tmp_path):
    sft, dpo = one("sft"), one("dpo")
    dpo.model.path, dpo["from"].model = None, "first"
    return stages(str(tmp_path), first=sft, second=dpo)


def test_a_stage_alone_has_the_name_of_its_algorithm_and_plain_flags(planned):
    found = planned(one("sft"))
    assert found["fits"] == {"sft": True}
    assert found["version"] == __version__ and "seconds" in found["units"]
    stage = found["stages"]["sft"]
    assert stage["run"]["steps"] == 100 and stage["run"]["price"] == pytest.approx(2 * 150 * 8 / 3600)
    assert stage["losses"][0]["change"] == "--config.data.packing=True"


def test_flags_of_several_stages_have_their_names(planned, tmp_path):
    found = planned(both(tmp_path), too_large=("dpo",))
    assert found["fits"] == {"first": True, "second": False}
    assert found["stages"]["first"]["losses"][0]["change"] == "--config.first.data.packing=True"
    assert found["stages"]["second"]["change"] == "--config.second.model.remat=full"
    assert found["together"]["seconds"]["total"] == pytest.approx(300.0)
    assert planned.said[0].startswith("first: fits: 1.0 of 100.0 GiB") and "second: does not fit" in planned.said[1]
    page = as_text(found, assumptions(read_machines()["h200"]))
    assert "--config.second.data.packing=True" in page and "changes the optimisation" in page
    with pytest.raises(InputError, match="stage second") as error:
        planning.require_fit(found)
    assert "200.00 GiB" in error.value.found and error.value.fix == "--config.second.model.remat=full"


def test_what_the_compiler_refuses_is_one_stage_of_the_plan(planned, tmp_path):
    found = planned(both(tmp_path), refused=("sft",))
    assert found["fits"] == {"first": False, "second": True}
    assert found["stages"]["first"]["programs"] == [] and "out of memory" in found["stages"]["first"]["problem"]
    assert found["together"] is None
    with pytest.raises(InputError, match="out of memory") as error:
        planning.require_fit(found)
    assert error.value.fix == "--config.first.model.remat=full"


def test_what_is_wrong_with_the_last_stage_is_told_before_the_first_is_compiled(planned, tmp_path):
    with pytest.raises(InputError, match="stage second") as error:
        planned(both(tmp_path), wrong=("dpo",))
    assert error.value.fix == "--config.second.batch_size=8"
    assert planned.said == []

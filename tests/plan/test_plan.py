"""Names of machines, and what a plan says; compiling for them is tests/absent."""

import re

import pytest

from jaxalign.errors import InputError
from jaxalign.plan.machines import parse_topology
from jaxalign.plan.programs import _COLLECTIVE, MachinePlan


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tpu:v5p:2x2x4", ("tpu", "v5p", "2x2x4", 1)),
        ("tpu:v5e:16x16", ("tpu", "v5e", "16x16", 1)),
        ("tpu:v6e:4x4:2", ("tpu", "v6e", "4x4", 2)),
        ("gpu:h200:1x8x1", ("gpu", "h200", "1x8x1", 1)),
    ],
)
def test_names_of_machines(name, parts):
    assert parse_topology(name) == parts


@pytest.mark.parametrize(
    "name", ["v5p:2x2x4", "tpu:v5p", "gpu:h200:8", "gpu:h200:1x8x1:2", "tpu:v5p:2x2x", "gpu:k80:1x8x1"]
)
def test_a_wrong_name_says_what_it_may_be(name):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    assert name in error.value.found or "k80" in error.value.found
    assert re.search(r"(tpu|gpu):", error.value.fix)


def test_what_a_plan_says():
    memory = {"arguments": 3 * 2**30, "results": 0, "temporary": 2**30, "total": 4 * 2**30}
    plan = MachinePlan("tpu:v5p:2x2x4", "TPU v5", 16, {"fsdp": 16}, memory, 95 * 2**30, {"all-gather": 2}, 1.0)
    assert plan.fits is True
    assert plan._replace(limit=2**30).fits is False
    assert plan._replace(limit=None).fits is None
    assert "total 4.000; there: 95.0 GiB" in str(plan)
    assert "16 x TPU v5, mesh {'fsdp': 16}: fits" in str(plan)


def test_collectives_are_read_from_a_program():
    text = """
      %ag = f32[8,4]{1,0} all-gather(%x), channel_id=1
      %ar = (f32[2], f32[2]) all-reduce-start(%y, %z), channel_id=2
      %done = (f32[2], f32[2]) all-reduce-done(%ar)
      %use = f32[8,4] add(%ag, %all-reduce.1)
    """
    assert _COLLECTIVE.findall(text) == ["all-gather", "all-reduce"]

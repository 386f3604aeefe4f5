"""Predictions of accounts made by hand."""

import types

import pytest

from jaxalign.errors import InputError
from jaxalign.parallel.hardware import read_machines
from jaxalign.plan.account import Account, Collective, Product, Stretch
from jaxalign.plan.machines import joined
from jaxalign.plan.predict import alone_and_hidden, assumptions, collective_seconds, link, predict
from jaxalign.plan.search import bandwidths

GPU, TPU = read_machines()["h200"], read_machines()["v5p"]


def assumed(machine=GPU, *given):
    plain = ("efficiency=1", "memory_efficiency=1", "link_efficiency=1", "latency=0", "launch=0")
    return assumptions(machine, [*plain, *given])


def device(i, *coords, slice_index=None):
    return types.SimpleNamespace(id=i, coords=list(coords), slice_index=slice_index)


GPUS = [device(i, slice_index=0) for i in range(16)]


class Gpu(types.SimpleNamespace):
    __hash__ = object.__hash__  # a mesh is kept by its devices


def gather(size, groups, *, asynchronous=False, flops=0.0, moved=0.0, times=1, kind="all-gather"):
    between = (Stretch(0, flops, moved),)
    return Collective(kind, "bf16", size, len(groups[0]), groups, times, "", asynchronous, between, "")


def counted(products=(), collectives=(), traffic=0.0, kernels=0):
    given = {
        "products": tuple(products),
        "collectives": tuple(collectives),
        "traffic_bytes": traffic,
        "kernels": kernels,
    }
    return Account(**(dict.fromkeys(Account._fields, ()) | given))


def product(flops, times=1, dtypes=("bf16", "bf16"), what="dot", moved=0):
    return Product("dot", dtypes, "bf16", flops, times, "", moved, what)


def test_products_run_at_the_peak_or_at_the_memorys_speed():
    busy = counted([product(989e9, times=10, moved=int(4.8e8))])
    assert predict(busy, assumed(), GPUS).products == pytest.approx(0.01)
    each = counted([product(989e9), product(1.0, times=2, moved=int(48e9))])
    assert predict(each, assumed(), GPUS).products == pytest.approx(0.021)


def test_float32_and_attention_have_speeds_of_their_own():
    one = assumed(GPU, "float32_speed=0.25", "attention_efficiency=0.5")
    assert predict(counted([product(989e9, dtypes=("f32", "bf16"))]), one, GPUS).products == pytest.approx(4e-3)
    assert predict(counted([product(989e9, what="attention dq")]), one, GPUS).products == pytest.approx(2e-3)


def test_traffic_and_gaps():
    time = predict(counted(traffic=48e9, kernels=1000), assumed(GPU, "launch=1e-6", "memory_efficiency=0.5"), GPUS)
    assert time.traffic == pytest.approx(0.02)
    assert time.gaps == pytest.approx(1e-3)
    assert time.total == pytest.approx(0.021)


def test_a_ring_moves_all_but_its_own_share():
    inside, across = (tuple(range(8)),), (tuple(range(0, 16, 8)),)
    assert collective_seconds(gather(450e9, inside), assumed(), GPUS) == pytest.approx(7 / 8)
    assert collective_seconds(gather(450e9, inside, kind="all-reduce"), assumed(), GPUS) == pytest.approx(14 / 8)
    assert collective_seconds(gather(50e9, across), assumed(), GPUS) == pytest.approx(1 / 2)  # between hosts
    assert collective_seconds(gather(1e9, ((0,),)), assumed(), GPUS) == 0


def test_a_sparse_core_takes_the_rings_that_it_has():
    cube = [device(i, i % 2, i // 2 % 2, i // 4) for i in range(8)]
    whole = gather(8e9, (tuple(range(8)),), kind="reduce-scatter")
    three, two = (collective_seconds(c, assumed(TPU), cube) for c in (whole, whole._replace(rings=2)))
    assert (three, two) == pytest.approx((7e9 / 270e9, 7e9 / 180e9))


def test_the_links_of_a_torus():
    cube = [device(i, i % 2, i // 2 % 2, i // 4) for i in range(8)]
    assert link((0, 1), assumed(TPU), cube).bandwidth == pytest.approx(90e9)
    assert link(tuple(range(8)), assumed(TPU), cube).bandwidth == pytest.approx(270e9)
    line = [device(i, i, 0, 0) for i in range(4)]
    assert link(tuple(range(4)), assumed(TPU), line).bandwidth == pytest.approx(180e9)  # a side of four is closed
    long = [device(i, i, 0, 0) for i in range(8)]
    assert link((0, 1, 2, 3), assumed(TPU), long).bandwidth == pytest.approx(90e9)  # half a side is no ring
    assert link(tuple(range(8)), assumed(TPU), long).bandwidth == pytest.approx(180e9)
    six = [device(i, i, 0, 0) for i in range(6)]
    assert link(tuple(range(6)), assumed(TPU), six).bandwidth == pytest.approx(90e9)
    slices = [device(i, 0, 0, 0, slice_index=i) for i in range(2)]
    assert link((0, 1), assumed(TPU), slices).name == "network"
    both = [device(i, i % 4, 0, 0, slice_index=i // 4) for i in range(8)]
    assert link(tuple(range(8)), assumed(TPU), both).bandwidth == pytest.approx(4 * 6.25e9)


def test_rings_between_hosts_have_a_network_card_for_each_of_their_gpus():
    """The network is 50 GB/s of each GPU, NVLink 450 GB/s."""
    h100 = read_machines()["h100"]
    four = assumed(joined(h100, "gpu:h100:2x1x4"))
    assert link((0, 1, 2, 3), four, GPUS) == ("link", 450e9)
    assert link(tuple(range(8)), four, GPUS) == ("network", 200e9)
    assert link((0, 4), four, GPUS) == ("network", 50e9)
    assert link((0, 1, 4), four, GPUS) == ("network", 50e9)
    one = assumed(joined(h100, "gpu:h100:1x2x4"))  # two hosts of a slice
    assert link(tuple(range(8)), one, GPUS) == ("link", 450e9)
    eight = assumed(joined(h100, "gpu:h100:1x2x8"))  # no more than a domain
    assert link(tuple(range(16)), eight, GPUS) == ("network", 400e9)
    assert link(tuple(range(16)), assumed(joined(h100, "gpu:h100:2x1x8"), "network=1e12"), GPUS).bandwidth == 450e9


def test_a_search_knows_which_axis_crosses_hosts():
    h100 = assumed(joined(read_machines()["h100"], "gpu:h100:2x1x8"))
    given = [Gpu(id=i, slice_index=0, platform="gpu", device_kind="", process_index=i // 8)
             for i in range(16)]  # fmt: skip
    assert bandwidths((2, 4, 2), given, h100) == {"data": 50e9, "fsdp": 450e9, "tensor": 450e9}
    assert bandwidths((1, 16, 1), given, h100) == {"data": 450e9, "fsdp": 400e9, "tensor": 450e9}


def test_work_between_start_and_end_hides_a_collective():
    group = (tuple(range(2)),)
    part = gather(450e9, group, asynchronous=True, flops=0.3 * 989e12, times=2)
    time = predict(counted(collectives=[part]), assumed(), GPUS)
    assert time.collectives == pytest.approx(2 * (0.5 - 0.3))
    assert time.hidden == pytest.approx(0.6)
    # Each of a loop's turns by itself; the memory may be what is waited for.
    moved = gather(450e9, group, asynchronous=True, flops=0.1 * 989e12, moved=0.4 * 4.8e12)
    assert predict(counted(collectives=[moved]), assumed(), GPUS).hidden == pytest.approx(0.4)
    alone = predict(counted(collectives=[part._replace(asynchronous=False)]), assumed(), GPUS)
    assert alone.collectives == pytest.approx(1.0)


def test_work_hides_a_collective_once():
    """Three of half a second: the second ends first and takes its 0.3 s; 0.3 s are left for the others."""
    group = (tuple(range(2)),)
    work = [Stretch(i, seconds * 989e12, 0.0) for i, seconds in enumerate((0.1, 0.2, 0.3))]
    some = gather(450e9, group, asynchronous=True)
    each = [some._replace(between=tuple(between)) for between in (work, work[:2], work[1:])]
    found = alone_and_hidden(counted(collectives=each), assumed(), GPUS)
    assert [hidden for _, _, hidden in found] == pytest.approx([0.3, 0.3, 0.0])
    time = predict(counted(collectives=each), assumed(), GPUS)
    assert (time.collectives, time.hidden) == (pytest.approx(0.9), pytest.approx(0.6))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("pol=0.9", "pool"),
        ("pool=1.5", "share"),
        ("pool", "share"),
        ("launch=-1", "positive"),
        ("flops=nan", "positive"),
        ("price=$2", "price=2"),
        ("steps", "steps=1000"),
    ],
)
def test_an_assumption_that_cannot_be(text, word):
    with pytest.raises(InputError) as error:
        assumptions(GPU, [text])
    assert word in error.value.expected + error.value.fix


def test_every_assumption_is_printed():
    one = assumptions(GPU, ["pool=0.9"])
    lines = one.lines()
    assert {line.partition("=")[0] for line in lines} == set(one.values)
    assert any(line.startswith("pool=0.9 ") for line in lines)

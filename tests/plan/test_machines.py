"""The table of machines, and a file of one's own that adds to it."""

import os
import re

import pytest

from jaxalign.errors import InputError
from jaxalign.parallel.hardware import find_machine, of_kind, read_machines
from jaxalign.plan import machines
from jaxalign.plan.machines import nearest_shape, parse_topology
from jaxalign.train.flops import peak_flops

MINE = """
[mine]
platform = "gpu"
kinds = ["NVIDIA Mine"]
flops = 1e15
memory = 100_000_000_000
bandwidth = 5e12
link = 1e11
domain = 4
network = 1e10
target = { capability = "9.0", cores = 9, fpus = 8, threads = 8, shared = 1, shared_block = 1, l2 = 1, clock = 1 }

[h100]
pool = 0.9
"""


def test_every_machine_that_can_be_planned_for():
    machines = {name for name, m in read_machines().items() if m.platform}
    asked = {"v5e", "v5p", "v6e", "a100-40", "a100-80", "l40s", "rtx4090", "l4", "h100", "h200"}
    assert asked <= machines
    for name in asked:
        m = read_machines()[name]
        assert m.flops / m.bandwidth > 50  # FLOP a byte
        assert m.link > m.network
        assert 0.5 < m.pool <= 1
        assert (m.target is None) == (m.platform == "tpu")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
    ],
)
def test_the_longest_kind_that_fits_is_meant(kind, name):
    assert of_kind(kind).name == name
    assert peak_flops(kind) == of_kind(kind).flops


def test_a_file_adds_machines_and_overrides_numbers(tmp_path):
    file = tmp_path / "machines.toml"
    file.write_text(MINE)
    machines = read_machines(file)
    assert find_machine("mine", "gpu", machines).domain == 4
    assert machines["h100"].pool == 0.9
    assert machines["h100"].flops == read_machines()["h100"].flops
    assert parse_topology("gpu:mine:1x4x1", machines)[1] == "mine"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[h100]\nflop = 1", "flops"),
        ("[mine]\nkinds = ['x']", "flops"),
        ("[mine]\nkinds = ['x']\nflops = 1e12\nplatform = 'gpu'", "memory"),
        ("[h100]\nbandwidth = -1", "bandwidth"),
        ("[h100]\nbandwidth = nan", "bandwidth"),
        ("[h100]\nplatform = 'npu'", "npu"),
        ("pool = 0.9", "pool"),
        ("[h100]\npool = 1.5", "programs may use"),
        ("[h100]\nmemory = 'all'", "driver"),
        ("[mine]\nkinds = ['x']\nflops = 1e12\nplatform = 'gpu'", "driver"),
        ("[h100", "TOML"),
        ("a = " + "[" * 3000, "TOML"),
        ("[h100]\nflops = " + "9" * 5000, "TOML"),
        ("[h100]\ndomain = 2.5", "domain"),
        ("[v5e]\naxes = 9", "axes"),
        ("[h100]\npool = 2.0", "pool"),
        ("[h100]\nkinds = ['']", "kinds"),
        ("[h100]\nkinds = ['a\"b']", "kinds"),
        (MINE.replace("cores = 9", "cores = 9.5"), "cores"),
        (MINE.replace("cores = 9", "cores = -1"), "cores"),
        (MINE.replace("cores = 9", "cores = [9]"), "cores"),
        (MINE.replace("clock = 1", "clock = nan"), "clock"),
        (MINE.replace("clock = 1", "clock = 1, cors = 2"), "cores"),
        (MINE.replace('"9.0"', '"nine"'), "capability"),
    ],
)
def test_a_file_that_is_wrong_says_where(text, word, tmp_path):
    file = tmp_path / "machines.toml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_machines(file)
    assert word in str(error.value)
    assert str(file) in error.value.found


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "\0", "nowhere.toml"])
def test_machines_are_read_from_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # nobody writes into it
    with pytest.raises(InputError, match="machines"):
        read_machines(name)


def test_bytes_may_be_written_as_a_float(tmp_path):
    file = tmp_path / "machines.toml"
    file.write_text("[h100]\nmemory = 80e9")
    assert read_machines(file)["h100"].memory == 80_000_000_000


@pytest.mark.parametrize(
    "name", ["gpu:h100:1x8x100000", "gpu:h100:1x1x" + "9" * 5000, "tpu:v5e:2x2:" + "9" * 5000, "gpu:h100:1x٨x1"]
)
def test_more_devices_than_there_can_be(name):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    assert error.value.fix.startswith("--on=")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gpu:h300:1x8x1", "gpu:h200:1x8x1"),
        ("gpu:a100-90:1x8x1", "gpu:a100-80:1x8x1"),
        ("tpu:v5q:2x2x2", "tpu:v5"),
        ("gpu:rtx4080:1x2x1", "gpu:rtx4090:1x2x1"),
    ],
)
def test_an_unknown_machine_gets_the_nearest(name, near):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    assert near in error.value.fix


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("h100", "gpu:h100:1x8x1"),
        ("gpu:h100:8", "gpu:h100:1x8x1"),
        ("gpu:h100:1x8x1:2", "gpu:h100:2x1x8"),
        ("gpu:a100:4", "gpu:a100-80:1x4x1"),
        ("gpu:h300:4", "gpu:h200:1x4x1"),
        ("v5p-8", "tpu:v5p:2x2x1"),
        ("v6e-16", "tpu:v6e:4x4"),
        ("GPU:h200:1x8x1", "gpu:h200:1x8x1"),
        ("8", "gpu:h200:1x8x1"),
        ("gpu:h100:" + "9" * 5000, "gpu:h100:512x1x8"),
    ],
)
def test_another_form_of_a_name_gets_the_whole_right_one(name, whole):
    with pytest.raises(InputError) as error:
        parse_topology(name)
    assert error.value.fix == f"--on={whole}"
    parse_topology(whole)


def test_nearest_shapes():
    assert nearest_shape("v6e", "2x2x2", 2) == "2x4"
    assert nearest_shape("v5p", "8", 3) == "2x2x2"


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


def test_sizes_of_zero_are_ones_in_the_fix_and_the_kind_stays():
    with pytest.raises(InputError) as error:
        parse_topology("gpu:h100:1x10x0")
    assert error.value.fix == "--on=gpu:h100:1x10x1"


def test_a_slice_has_as_many_sides_as_its_torus(monkeypatch):
    monkeypatch.setattr(machines, "_require_compiler", lambda platform: None)
    with pytest.raises(InputError, match="2 sides") as error:
        machines.absent_devices("tpu:v6e:2x2x2")
    assert error.value.fix == "--on=tpu:v6e:2x4"

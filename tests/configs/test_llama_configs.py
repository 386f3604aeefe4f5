"""The lab notes for Llama-3.1-8B: that they divide on their machines, what they say of memory, that they follow on."""

import importlib.util
from pathlib import Path

import jax
import pytest

from jaxalign.config import validate
from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.parallel.mesh import mesh_shape
from jaxalign.pipeline.configfile import load_config
from jaxalign.pipeline.stages import plan

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("sft", "reward", "dpo", "ppo")
DEVICES = 8  # of an H100 node, and of a v5p-16 slice
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 500_000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def config_of(name):
    return load_config(f"{ROOT}/configs/{name}.py")


@pytest.mark.parametrize("name", NAMES)
def test_it_validates_and_divides(name):
    c = config_of(name)
    assert validate(c) == []  # whole, and within the guides' ranges
    data, fsdp, _ = mesh_shape(c.mesh, DEVICES)
    parts = data * fsdp * c.grad_accum_steps * c.algorithm.get("num_minibatches", 1)
    assert c.batch_size % parts == 0
    assert c.model.dtype == "bfloat16"
    assert c.model.param_dtype == "float32"


def test_stages_start_from_each_other():
    workdirs = {name: config_of(name).workdir for name in NAMES}
    for name in ("reward", "dpo", "ppo"):
        assert config_of(name).model.path == f"{workdirs['sft']}/export"
    assert config_of("ppo").rewards.model == f"{workdirs['reward']}/export"


def test_bytes_by_role():
    """What the lab notes say under `memory`: per device, weights and two moments in float32, frozen in bfloat16."""
    sizes = {}
    for head in ("lm", "score"):
        config = from_hf(LLAMA_8B, dtype="bfloat16", param_dtype="float32", remat="full", head=head)
        sizes[head] = sum(x.size for x in jax.tree.leaves(Model(config).abstract()))
    assert sizes["lm"] == 8_030_261_248  # as published
    gib = {head: size / DEVICES / 2**30 for head, size in sizes.items()}
    held = {
        "sft": 12 * gib["lm"],
        "reward": 12 * gib["score"],
        "dpo": 12 * gib["lm"] + 2 * gib["lm"],
        "ppo": 12 * gib["lm"] + 12 * gib["score"] + 2 * gib["lm"] + 2 * gib["score"],
    }
    for name in NAMES:
        doc = _doc(name)
        assert f"holds {held[name]:.1f} GiB" in doc, f"{name}: holds {held[name]:.1f} GiB"


def test_bytes_of_full_training_on_the_page():
    """What docs/memory.md says of 8B: weights, gradients and two moments of what is trained, the frozen in 16 bits."""
    page = (ROOT / "docs" / "memory.md").read_text()
    lm, score = 8_030_261_248 / 1e9, 7_504_928_768 / 1e9
    for title, number in (("all in 16 bits", 2 + 2 + 4), ("float32", 4 + 4 + 8)):
        held = (number * lm, number * score, number * lm + 2 * lm, (number + 2) * (lm + score))
        assert f"| {title} | " + " | ".join(f"{gb:.1f} GB" for gb in held) + " |" in page


@pytest.mark.parametrize("memory", ["24gb", "80gb"])
def test_four_stages_on_one_gpu(memory):
    """They validate one by one and together: adapters that go on from stage to stage, PPO's roles on one base."""
    config = load_config(f"{ROOT}/configs/one_gpu.py:{memory}")
    planned = plan(config)
    assert [stage.name for stage in planned] == ["sft", "reward", "dpo", "ppo"]
    for stage in planned:
        c = stage.config
        assert c.adapter.rank == 16 and c.model.frozen_dtype == ("nf4" if memory == "24gb" else "bfloat16")
        assert c.batch_size % (c.grad_accum_steps * c.algorithm.get("num_minibatches", 1)) == 0
        assert not stage.checked.warnings, stage.checked.warnings
    assert planned[-1].config.algorithm.one_base


def test_a_card_that_one_gpu_has_no_config_for():
    with pytest.raises(InputError, match=r"fix: +--config=configs/one_gpu.py:24gb$"):
        load_config(f"{ROOT}/configs/one_gpu.py:16gb")


def _doc(name):
    spec = importlib.util.spec_from_file_location(f"lab_note_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return " ".join(module.__doc__.split())

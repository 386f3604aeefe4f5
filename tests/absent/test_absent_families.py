"""Windows, adapters and kernels in few bits, compiled for accelerators that are not there."""

import json

import pytest

from jaxalign import config as configuration
from jaxalign.plan.plan import plan, plan_step
from jaxalign.train import compiled
from tests.absent.test_absent_machines import MACHINES


def config_of(algorithm, model, data, tmp_path):
    """Rows over all devices."""
    c = configuration.defaults(algorithm)
    c.workdir, c.model.path, c.data.sources = str(tmp_path / "run"), str(model), (str(data),)
    c.model.dtype, c.data.max_length, c.batch_size = "bfloat16", 128, 16
    return c


@pytest.mark.parametrize("machine", MACHINES)
def test_pairs_that_share_a_prompt_longer_than_the_window(machine, shared, pairs, tmp_path, monkeypatch):
    """Neither Mosaic, Triton nor Splash can: the step compiles with attention that compares positions."""
    source = shared / "models" / "stories3m-llama"
    model = tmp_path / "model"
    model.mkdir()
    for file in source.iterdir():
        (model / file.name).symlink_to(file)
    described = json.loads((source / "config.json").read_text())
    (model / "config.json").unlink()
    windowed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (model / "config.json").write_text(json.dumps(described | windowed))
    executables, of = [], compiled.memory_of
    monkeypatch.setattr(compiled, "memory_of", lambda x, *more: executables.append(x) or of(x, *more))
    plan_step(config_of("dpo", model, pairs, tmp_path), machine)
    text = executables[0].as_text()
    assert not any(kernel in text for kernel in ("splash", "__gpu$xla.gpu.triton", "mosaic_gpu"))


GPU, TPU = "gpu:h200:1x8x1", "tpu:v5p:2x2x4"


@pytest.mark.parametrize(("machine", "kind", "remat"), [(GPU, "nf4", "full"), (TPU, "int8", "dots")])
def test_an_adapter_beside_kernels_in_few_bits(machine, kind, remat, shared, completions, tmp_path):
    """Frozen kernels arrive and are gathered as codes, and every product is in the dtype of the computation."""
    c = config_of("sft", shared / "models" / "stories3m-llama", completions, tmp_path)
    c.adapter.rank, c.model.frozen_dtype, c.model.remat = 8, kind, remat
    found = plan_step(c, machine)
    (step, *_) = found["programs"]
    assert step["fits"] and step["unknown_kernels"] == [] and step["flops"]["other_dtype"] == 0
    kernels = 6 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512)
    a_number = {"nf4": 0.516, "int8": 1.0625}[kind]  # bytes, scales included
    rest = 2 * 4096 * 192  # the embedding, in bfloat16, is the head too
    held = (a_number * kernels + rest) / MACHINES[machine][1]
    assert step["memory"]["policy (frozen)"] == pytest.approx(held, rel=0.05), step["memory"]
    codes = sum(g["bytes"] for g in step["collectives"] if g["kind"] == "all-gather" and g["dtype"] in ("s8", "u8"))
    assert codes > (1 if kind == "int8" else 0.5) * kernels


def test_ppo_of_an_adapter(shared, pairs, tmp_path):
    """The rollout merges the adapter into the base that roles share."""
    c = config_of("ppo", shared / "models" / "stories3m-llama", pairs, tmp_path)
    c.adapter.rank, c.algorithm.one_base = 8, True
    c.rewards.function, c.rollout.max_new_tokens = "jaxalign.plan.assumed:no_reward", 16
    found, _ = plan(c, "gpu:h200:1x1x1")
    assert found["fits"] == {"ppo": True}
    memory = found["stages"]["ppo"]["programs"][-1]["memory"]
    base = memory["policy (frozen)"]
    assert base > 1e7 and memory["value (frozen)"] + memory["ref (frozen)"] < 0.01 * base  # the same arrays

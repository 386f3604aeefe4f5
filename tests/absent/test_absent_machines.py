"""The train steps compiled ahead of time for target topologies; runs where the extra `plan` is installed (.ci/run)."""

import json

import jax
import pytest

from jaxalign import config as configuration
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.plan import machines, programs
from jaxalign.train import compiled

# A TPU v5p slice of 16 chips, and eight H200.
MACHINES = {"tpu:v5p:2x2x4": ("TPU v5", 16), "gpu:h200:1x8x1": ("NVIDIA H200", 8)}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file that serves all four algorithms."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("a", "small", "red", "fox", "ran", "to", "the", "big", "green", "tree", "and", "sat", "down")
    with open(path, "w") as file:
        for i in range(64):
            record = {
                "prompt": " ".join(words[: 2 + i % 5]),
                "chosen": " " + " ".join(words[i % 3 :]),
                "rejected": " " + " ".join(words[: 4 + i % 4]),
            }
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def completions(pairs):
    """The chosen halves, for SFT."""
    path = pairs.with_name("completions.jsonl")
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in records))
    return path


def config_of(algorithm, shared, pairs, completions, tmp_path):
    """A run of the small Llama: rows over eight or four shards, heads and hidden units over two."""
    c = configuration.defaults(algorithm)
    c.workdir = str(tmp_path)
    c.model.path = str(shared / "models" / "stories3m-llama")
    c.model.dtype = "bfloat16"
    c.data.sources = (str(completions if algorithm == "sft" else pairs),)
    c.data.max_length = 128
    c.batch_size = 16
    c.mesh.tensor = 2
    if algorithm == "ppo":
        c.rollout.max_new_tokens = 16
        c.rewards.model = reward_model(c.model.path, tmp_path / "reward")
    return c


def reward_model(path, directory):
    """The language model with a fresh scalar head, as a reward model's directory."""
    model, params = hf.load(
        path, head="score", key=jax.random.key(0), dtype="float32", param_dtype="float32", remat="none"
    )
    hf.save(directory, model, params, source=path)
    return str(directory)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("algorithm", configuration.ALGORITHMS)
def test_a_train_step_compiles(algorithm, machine, shared, pairs, completions, tmp_path):
    found = programs.compile_for(machine, config_of(algorithm, shared, pairs, completions, tmp_path))
    kind, devices = MACHINES[machine]
    assert (found.device_kind, found.num_devices) == (kind, devices)
    assert found.mesh == {"data": 1, "fsdp": devices // 2, "tensor": 2}
    assert found.fits
    assert 0 < found.memory["temporary"] < 2**30
    assert {"all-gather", "all-reduce"} & set(found.collectives)  # it is a program for several devices
    print(found)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_kept_for_the_backward_pass_goes_to_the_host(machine, shared, completions, tmp_path, monkeypatch):
    executables = []
    monkeypatch.setattr(compiled, "memory_of", lambda x, of=compiled.memory_of: executables.append(x) or of(x))
    device, host = {}, {}
    for remat in ("dots", "offload"):
        c = config_of("sft", shared, completions, completions, tmp_path / remat)
        c.model.remat, c.data.packing, c.batch_size = remat, False, 256
        device[remat] = programs.compile_for(machine, c).memory["temporary"]
        host[remat] = executables[-1].memory_analysis().host_temp_size_in_bytes
    print(machine, device, host)
    assert device["offload"] < 0.9 * device["dots"]
    assert host["dots"] == 0 < host["offload"]


def test_accumulation_compiles(shared, pairs, completions, tmp_path):
    c = config_of("dpo", shared, pairs, completions, tmp_path)
    c.grad_accum_steps = 2
    assert programs.compile_for("tpu:v5p:2x2x4", c).fits


def test_sharding_shows_in_the_memory(shared, pairs, completions, tmp_path):
    """Split parameters take less room than whole ones on every device."""
    c = config_of("sft", shared, pairs, completions, tmp_path)
    split = programs.compile_for("tpu:v5p:2x2x4", c)
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 16, 1, 1
    whole = programs.compile_for("tpu:v5p:2x2x4", c)
    assert split.memory["arguments"] < 0.3 * whole.memory["arguments"]


def test_a_shape_that_does_not_exist_is_refused():
    with pytest.raises(InputError):
        machines.absent_devices("tpu:v99:2x2")

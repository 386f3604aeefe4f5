"""What stages run, compiled for machines that are not there; runs where the extra `plan` is installed (.ci/run)."""

import json
import shutil
from collections import Counter

import jax
import pytest

from jaxalign import config as configuration
from jaxalign.cli import main
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.plan import machines
from jaxalign.plan.plan import plan, plan_step
from jaxalign.plan.report import as_text
from jaxalign.train import compiled

# A TPU v5p slice of 16 chips, and eight H200.
MACHINES = {"tpu:v5p:2x2x4": ("TPU v5", 16), "gpu:h200:1x8x1": ("NVIDIA H200", 8)}


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


# Programs of a stage beside its train step, and how often one runs in a step.
OTHERS = {
    "sft": {"evaluation step": 0},
    "reward": {},
    "dpo": {"reference pass": 0},
    "ppo": {
        "prefill": 1,
        "layout: embed, head": 1,
        "layout: a layer": 6,
        "decode": 16,
        "scoring": 1,
        "forward passes": 1,
    },
}


TPU, GPU = MACHINES


@pytest.mark.parametrize(
    ("algorithm", "machine"), [("sft", GPU), ("sft", TPU), ("reward", GPU), ("dpo", TPU), ("ppo", GPU), ("ppo", TPU)]
)
def test_a_plan_of_every_program(algorithm, machine, shared, pairs, completions, tmp_path):
    c = config_of(algorithm, shared, pairs, completions, tmp_path)
    if algorithm == "sft":
        c.data.eval_fraction = 0.25
    elif algorithm == "dpo":
        c.algorithm.reference = "cached"
        c.grad_accum_steps = 2
    found, assumed = plan(c, machine)
    kind, devices = MACHINES[machine]
    assert (found["machine"]["kind"], found["machine"]["devices"]) == (kind, devices)
    stage = found["stages"][algorithm]
    assert found["fits"] == {algorithm: True} and stage["run"]["device_hours"] > 0
    assert stage["mesh"] == {"data": 1, "fsdp": devices // 2, "tensor": 2}
    programs = {p["name"].split(" (")[0]: p for p in stage["programs"]}
    step = programs.pop("train step")
    assert {name: p["times"] for name, p in programs.items()} == OTHERS[algorithm]
    for p in (step, *programs.values()):
        check_memory(p)
        assert p["seconds"]["total"] > 0
        assert p["unknown_kernels"] == []
    assert {"all-gather", "all-reduce"} & {each["kind"] for each in step["collectives"]}  # of several devices
    # A forward pass is computed again, three more are the model's; padding is multiplied too.
    assert 1.0 < step["flops"]["products"] * step["fill"] / step["flops"]["model"] < 1.7
    assert step["flops"]["other_dtype"] < 0.05 * step["flops"]["products"]
    assert stage["iteration"]["seconds"] >= step["seconds"]["total"]
    if algorithm == "ppo":
        decoding = programs["decode"]["decoding"]
        assert 0.5 * (decoding["weights"] + decoding["cache"]) < decoding["bytes_per_token"]
        if machine == GPU:  # two sums a layer, the embedding's, and of each row the likeliest token and its log-prob
            summed = Counter()
            for each in programs["decode"]["collectives"]:
                summed[each["kind"], each["dtype"]] += each["count"]
            assert summed == {("all-reduce", "bf16"): 2 * 6 + 1, ("all-reduce", "f32"): 2, ("all-gather", "s32"): 1}
    page = as_text(json.loads(json.dumps(found)), assumed)
    assert "largest losses" in page
    assert all(len(line) <= 120 for line in page.splitlines())


def check_memory(p):
    """What is counted by role is what the compiler counts, but for what lies there and is no argument."""
    memory, counted = p["memory"], p["compiled"]
    held = sum(n for name, n in memory.items() if name not in ("peak", "pool", "temporary", "results"))
    assert held >= counted["arguments"]
    if p["name"] == "train step" and "reward (frozen)" not in memory:
        assert held - counted["arguments"] < 0.02 * held
    assert memory["temporary"] == counted["temporary"]
    assert memory["peak"] >= counted["total"] - counted["results"]
    assert p["fits"]


def test_what_does_not_fit_says_what_would(shared, completions, capsys):
    flags = [f"--model={shared / 'models' / 'stories3m-llama'}", f"--data={completions}", "--max_length=128"]
    argv = ["plan", "sft", *flags, "--batch_size=64", "--on=gpu:l4:1x4x1"]
    assert main([*argv, "--assume=pool=0.0024"]) == 2
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out
    assert "--grad_accum_steps=" in said.err or "--mesh.fsdp=4" in said.err


def test_several_machines_one_of_which_does_not_do(shared, completions, capsys, tmp_path):
    out, model = tmp_path / "plan.json", shared / "models" / "stories3m-llama"
    flags = [f"--model={model}", f"--data={completions}", "--max_length=128", "--batch_size=64", f"--json={out}"]
    assert main(["plan", "sft", *flags, "--on=gpu:l4:1x4x1,gpu:h100:1x4x1", "--assume=l4.pool=0.0024"]) == 0
    found, lines = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert found["fits"] == {"gpu:l4:1x4x1": False, "gpu:h100:1x4x1": True}
    assert [row["machine"] for row in found["ranking"]] == ["gpu:h100:1x4x1", "gpu:l4:1x4x1"]
    assert found["machines"]["gpu:h100:1x4x1"]["stages"]["sft"]["iteration"]["mfu"] > 0
    assert any(line.split()[:2] == ["gpu:l4:1x4x1", "NO"] for line in lines)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_kept_for_the_backward_pass_goes_to_the_host(machine, shared, completions, tmp_path, monkeypatch):
    """Of 24 layers, since what is on its way to the host takes the room of a few layers."""
    model = tmp_path / "model"
    shutil.copytree(shared / "models" / "stories3m-llama", model, ignore=shutil.ignore_patterns("*.safetensors*"))
    file = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(file | {"num_hidden_layers": 24}))
    executables, of = [], compiled.memory_of
    monkeypatch.setattr(compiled, "memory_of", lambda x, *more: executables.append(x) or of(x, *more))
    device, host = {}, {}
    for remat in ("dots", "offload"):
        c = config_of("sft", shared, completions, completions, tmp_path / remat)
        c.model.path, c.model.remat, c.data.packing, c.batch_size = str(model), remat, False, 256
        device[remat] = plan_step(c, machine)["programs"][0]["memory"]["temporary"]
        host[remat] = executables[-1].memory_analysis().host_temp_size_in_bytes
    print(machine, device, host)
    assert device["offload"] < 0.9 * device["dots"]
    assert host["dots"] == 0 < host["offload"]


@pytest.mark.parametrize(("shape", "near"), [("tpu:v5e:3x3", "tpu:v5e:2x2"), ("tpu:v5p:2x3x2", "tpu:v5p:2x2x2")])
def test_a_shape_that_does_not_exist_is_refused(shape, near):
    with pytest.raises(InputError) as error:
        machines.absent_devices(shape)
    assert near in error.value.fix

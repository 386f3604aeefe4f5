"""`jaxalign plan`: its flags, and what it refuses before anything is compiled; compiling is tests/absent."""

import importlib.util
import os
import signal
import subprocess
import sys

import jax
import pytest

from jaxalign.cli import main
from jaxalign.commands.plan import _own_flags
from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.ops.trees import by_path
from jaxalign.plan.assumed import AssumedData, absent, no_reward
from jaxalign.plan.programs import _work, completed
from jaxalign.plan.stages import stage_configs

CONFIG = """
from jaxalign.config import defaults
def get_config():
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources = "w", {path!r}, ("nowhere.jsonl",)
    return c
"""


def said(capsys, *argv):
    assert main(["plan", *argv]) == 2
    return capsys.readouterr().err


def test_its_own_flags_and_the_rest():
    own, search, rest = _own_flags(
        ["dpo", "--on", "gpu:h200:1x8x1", "--assume=pool=0.9", "--assume", "launch=0", "--search=3", "--model=m"]
    )
    assert own["on"] == ["gpu:h200:1x8x1"]
    assert own["assume"] == ["pool=0.9", "launch=0"]
    assert search == 3
    assert rest == ["dpo", "--model=m"]
    assert _own_flags(["dpo", "--search", "3", "--model=m"])[1:] == (3, ["dpo", "--model=m"])


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["dpo", "--model=m"], "--on=gpu"),
        (["--config=x.py", "--on=gpu:h200:8"], "gpu:KIND"),
        (["--config=x.py", "--on=gpu:h200:1x8x1", "--batch_size=8"], "--config.batch_size=8"),
        (["--config=x.py", "--on=gpu:h200:1x8x1", "--model=m"], "--config.model.path=m"),
        (["--config=x.py", "--on=gpu:h200:1x8x1", "--zebra=m"], "jaxalign plan --help"),
        (["dpo", "--model=m", "--on="], "--on"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--search=none"], "--search=6"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--search=²"], "--search=6"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--search=" + "9" * 5000], "--search=6"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--json=a\0b"], "--json"),
        (["dop", "--model=m", "--on=gpu:h200:1x8x1"], "jaxalign plan dpo"),
        (["--model=m", "--on=gpu:h200:1x8x1"], "jaxalign plan"),
        (["dpo", "--on=gpu:h200:1x8x1"], "jaxalign plan dpo --model DIR"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--serach=3"], "--search=3"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--asume", "pool=0.9"], "--assume"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--price=2"], "--assume price=2"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--dry_run"], "leave out --dry_run"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--details=all"], "--details"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--detail"], "--details"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1,tpu:v6e:2x4", "--assume=v5p.price=1"], "--assume v6e.price=1"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--on=tpu:v6e:2x4"], "--on=gpu:h200:1x8x1,tpu:v6e:2x4"),
        (["dpo", "--model=m", "--on=gpu:h200:1x8x1", "--json=nowhere/x.json"], "--json"),
        (["ppo", "--model=m", "--on=gpu:h200:1x8x1", "--reward=nowhere.py:f"], "nowhere.py"),
    ],
)
def test_wrong_flags(argv, word, capsys, tmp_path):
    if "--config=x.py" in argv:
        (tmp_path / "x.py").write_text(CONFIG.format(path="m"))
        argv = [arg.replace("x.py", str(tmp_path / "x.py")) for arg in argv]
    assert word in said(capsys, *argv)


def test_a_pipe_that_nobody_reads_is_no_place_for_results(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "--json" in said(capsys, "sft", "--model=m", "--on=gpu:h200:1x8x1", f"--json={tmp_path / 'pipe'}")


def test_an_unknown_machine_an_assumption_and_a_file(capsys, model):
    flags = ["sft", f"--model={model}"]
    assert "--on=gpu:h200:1x8x1" in said(capsys, *flags, "--on=gpu:h220:1x8x1")
    assert "--assume pool=" in said(capsys, *flags, "--on=gpu:h200:1x8x1", "--assume=pol=0.9")
    assert "nowhere.toml" in said(capsys, *flags, "--on=gpu:h200:1x8x1", "--machines=nowhere.toml")


@pytest.mark.parametrize("machine", ["gpu:h200:1x8x1", "tpu:v5p:2x2x2"])
def test_a_missing_compiler_names_the_extra(machine, capsys, model, monkeypatch):
    find = importlib.util.find_spec
    hidden = ("libtpu", "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a))
    assert "[plan]" in said(capsys, "sft", f"--model={model}", f"--on={machine}")


def test_no_error_of_a_plan_speaks_of_train(capsys):
    for argv in (["dpo", "--on=gpu:h200:1x8x1"], ["dpo", "m", "--on=gpu:h200:1x8x1"], ["dop", "--on=gpu:h200:1x8x1"]):
        assert "jaxalign train" not in said(capsys, *argv)


def test_a_plan_needs_no_weights_of_a_model_that_is_not_here(tmp_path):
    from jaxalign.plan.stages import make_stage

    c = defaults("sft")
    c.model.path, c.data.sources = "owner/gated", ("owner/name",)
    import jax

    with pytest.raises(InputError) as error:
        make_stage(c, jax.devices()[:1], str(tmp_path))
    assert "no weights" in error.value.fix and '--include "*.json"' in error.value.fix


def test_what_is_stood_for_is_said(model, tmp_path):
    """A reward model given as a hub id that is not here, and data of which no flag says anything."""
    import jax

    from jaxalign.plan.assumed import NO_DATA
    from jaxalign.plan.stages import make_stage

    c = defaults("ppo")
    c.model.path, c.data.sources, c.rewards.model = str(model), (NO_DATA,), "owner/reward"
    c.data.max_length, c.rollout.max_new_tokens, c.batch_size, c.algorithm.num_minibatches = 16, 8, 2, 1
    _, told = make_stage(c, jax.devices()[:1], str(tmp_path))
    assert any(text.startswith("no --data") for text in told)
    assert any("owner/reward is not here" in text and str(model) in text for text in told)


@pytest.mark.parametrize("steps, words", [(0, ()), (100, ("eval.every is 5,000", "100 steps")), (9000, ())])
def test_a_run_of_unknown_length_is_not_said_to_be_short(steps, words, model, tmp_path, monkeypatch):
    """Rows that stand for data make no epoch; only the steps that are assumed count."""
    import types

    import jax

    from jaxalign.parallel.hardware import read_machines
    from jaxalign.plan import described
    from jaxalign.plan.predict import assumptions

    c = defaults("sft")
    c.model.path, c.data.sources, c.data.max_length, c.batch_size = str(model), ("owner/name",), 16, 64
    c.data.eval_fraction, c.eval.every = 0.1, 5000
    step = {"name": "train step", "times": 1.0, "tokens": 1, "fits": True, "seconds": {"total": 1.0}}
    program = types.SimpleNamespace(text="", work=types.SimpleNamespace(share=1.0))
    monkeypatch.setattr(described, "programs", lambda *_, **__: [program])
    monkeypatch.setattr(described, "account", lambda *_, **__: None)
    monkeypatch.setattr(described, "_described", lambda *_: step | {"flops": {"model": 1.0}})
    monkeypatch.setattr(described, "losses_of", lambda *_: [])
    assumed = assumptions(read_machines()["h200"], [f"steps={steps}"])
    said = described.plan_stage(c, jax.devices()[:1], assumed, print)["warnings"]
    assert [all(word in text for word in words) for text in said if "eval.every" in text] == [True] * bool(words)


@pytest.mark.parametrize(
    ("number", "file", "word"),
    [(signal.SIGINT, "", "nothing was written"), (signal.SIGTERM, "x.json", "x.json was written")],
)
def test_a_stop_while_a_compiler_works(number, file, word, tmp_path):
    """At once, with a word and the signal's status; what was being written is gone."""
    code = f"""
import ctypes, pathlib, tempfile
from jaxalign.commands.stop import at_once
scratch = pathlib.Path({str(tmp_path / "scratch")!r})
scratch.mkdir()
with at_once(str(scratch)) as written:
    tempfile.mkdtemp()
    written += {[file] if file else []}
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
"""
    work = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert work.stdout.readline() == "ready\n"
    work.send_signal(number)
    _, error = work.communicate(timeout=50)
    assert work.returncode == 128 + number
    assert "jaxalign plan" in error and word in error and "Traceback" not in error
    assert not (tmp_path / "scratch").exists()


def test_help_says_the_machines(capsys):
    assert main(["plan", "--help"]) == 0
    assert "gpu:h200:1x8x1" in capsys.readouterr().out


@pytest.fixture
def model(shared):
    return shared / "models" / "stories3m-llama"


def test_what_may_be_elsewhere_is_assumed_and_a_misspelt_file_is_not():
    c = defaults("sft")
    c.data.sources = ("owner/name", "imdb", "https://example.org/a.jsonl", "nope.jsonl", "./nope")
    assert absent(c) == ["owner/name", "imdb", "https://example.org/a.jsonl"]


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_assumed_data_fill_their_rows(algorithm):
    c = defaults(algorithm)
    c.data.sources, c.data.max_length, c.batch_size = ("owner/name",), 256, 4
    assert absent(c) == ["owner/name"]
    data = AssumedData(c)
    batch, sides = data.batch(0), 2 if algorithm in ("reward", "dpo") else 1
    length = 256 - c.rollout.max_new_tokens if algorithm == "ppo" else 256 * sides
    assert batch.rows.tokens.shape == (4, length)
    work = _work(batch.rows)
    assert work.tokens == 4 * length
    assert work.visible == pytest.approx((length + 1) / 2)


def test_packed_records_see_themselves_alone():
    c = defaults("sft")
    c.data.sources, c.data.max_length, c.data.row_length, c.batch_size = ("owner/name",), 128, 512, 2
    c.data.packing = True
    assert _work(AssumedData(c).batch(0).rows).visible == pytest.approx(129 / 2)


def test_a_stage_starts_from_what_an_earlier_one_will_write(model, tmp_path):
    from jaxalign.config import stages

    sft, dpo = defaults("sft"), defaults("dpo")
    sft.model.path, sft.data.sources, dpo.data.sources = str(model), ("owner/a",), ("owner/b",)
    dpo["from"].model = "sft"
    found = stage_configs(stages(str(tmp_path), sft=sft, dpo=dpo))
    assert found["dpo"].model.path == str(model)


def test_a_mesh_and_a_batch_that_do_not_divide(model):
    from jaxalign.parallel.mesh import make_mesh
    from jaxalign.plan.stages import _mesh
    from jaxalign.train.minibatches import check_rows

    c = defaults("sft")
    c.mesh.tensor = 3
    import jax

    with pytest.raises(InputError) as error:
        _mesh(c, jax.devices()[:1])
    assert "--config.mesh.tensor=1" in error.value.fix
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    c.batch_size, c.grad_accum_steps = 10, 4
    with pytest.raises(InputError) as error:
        check_rows(c, mesh)
    assert error.value.fix in ("--config.batch_size=8", "--config.batch_size=12")


@pytest.mark.parametrize(
    ("together", "tokens", "seen"),
    [(1, 8 * (30 + 10), 40 * 40 / 2), (2, 4 * (30 + 20), 30 * 30 / 2 + 2 * 10 * (30 + 10 / 2))],
)
def test_completions_behind_their_prompts(together, tokens, seen):
    """Eight completions of 10 tokens, of prompts of 30 in 40 columns: alone, or two in a row."""
    work, width = completed(8, together, 30.0, 40, 10), 40 + 10 * together
    assert work.tokens == tokens
    assert work.visible == pytest.approx(seen / (30 + 10 * together))
    assert work.share == pytest.approx(seen / width**2)
    assert work.fill == pytest.approx((30 + 10 * together) / width)
    assert work.share == pytest.approx(work.fill * work.visible / width)


def test_a_reward_function_finds_no_columns_in_assumed_data():
    from jaxalign.rewards.function import FunctionScorer
    from jaxalign.train.algorithms import _columns

    c = defaults("ppo")
    c.data.sources, c.data.max_length, c.batch_size = ("owner/name",), 256, 4
    scorer = FunctionScorer(no_reward)
    assert _columns(AssumedData(c), scorer.needs) == set()
    scorer.expect(())


@pytest.mark.parametrize("offload", [False, True])
def test_moments_wait_in_the_hosts_memory_between_updates(offload, shared, tmp_path, monkeypatch):
    import jax
    import jax.numpy as jnp

    from jaxalign.parallel.device_memory import device_bytes
    from jaxalign.plan import programs
    from jaxalign.plan.collection import Call
    from jaxalign.plan.stages import make_stage

    c = defaults("ppo")
    c.model.path, c.data.sources = str(shared / "models" / "stories260k-llama"), ("owner/name",)
    c.rewards.function, c.algorithm.offload = "math:fsum", offload
    c.data.max_length, c.rollout.max_new_tokens, c.batch_size, c.algorithm.num_minibatches = 16, 8, 2, 1
    stage, _ = make_stage(c, jax.devices()[:1], str(tmp_path))
    one = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((2,), jnp.float32)).compile()
    monkeypatch.setattr(programs, "collection", lambda *_: [Call("prefill", one, (), ())])
    prefill, update = programs.programs(stage, limit=None)
    assert ("optimizer" in prefill.memory) is not offload
    m = stage.program.trained["policy"].model.config  # two prompts of 8 tokens, which decoding makes logits of
    matrices = m.embed_dim * m.head_dim * (2 * m.num_heads + 2 * m.num_kv_heads) + 3 * m.embed_dim * m.mlp_dim
    seen = 2 * m.num_heads * m.head_dim * 4.5
    assert prefill.flops == pytest.approx(16 * 2 * m.num_layers * (matrices + seen))
    assert update.memory["optimizer"] == device_bytes(stage.like.opt) > 0


def test_decoding_is_counted_at_the_mean_width_of_its_cache(monkeypatch):
    from jaxalign.plan import collection
    from jaxalign.rollout.sampling import Sampling

    made = lambda *args: collection.Call("decode", None, (), args[-1])  # noqa: E731
    monkeypatch.setattr(collection, "_decode_from", made)
    for widths in ([(256, 64), (384, 128), (768, 320)], [(768, 256)]):
        calls = list(collection._decode(None, None, None, Sampling(1.0, 512), 8, widths))
        assert sum(call.times for call in calls) == sum(n for _, n in widths)
        assert sum(call.times * call.results for call in calls) == sum(n * width for width, n in widths)
        assert calls[0].results == widths[-1][0]  # the widest: what must fit


def test_stages_start_from_the_adapters_that_earlier_ones_will_write(model, tmp_path, monkeypatch):
    """PPO on one base: a frozen copy of SFT's adapter and that of the reward model, and the base once."""
    from jaxalign.config import stages
    from jaxalign.plan import plan as planning

    made = {name: defaults(name, adapter=4) for name in ("sft", "reward", "ppo")}
    for name, c in made.items():
        c.data.sources, c.batch_size = ("owner/name",), 4
        if name != "sft":
            c["from"].model = "sft"
    made["sft"].model.path, made["ppo"]["from"].reward, made["ppo"].algorithm.one_base = str(model), "reward", True
    held = {}

    def plan_stage(c, devices, assumed, tell, made):
        program, of = made[0].program, held.setdefault(c.algorithm.name, {})
        for name, role in (*program.trained.items(), *program.frozen.items()):
            of.setdefault(name, set()).update(map(role.origin, by_path(role.abstract())))
        raise InputError("out of memory", "less", "none")

    monkeypatch.setattr(planning, "plan_stage", plan_stage)
    monkeypatch.setattr(planning, "nearest_that_fits", lambda *_: None)
    monkeypatch.setattr(planning, "absent_devices", lambda *_: jax.devices()[:1])
    planning.plan(stages(str(tmp_path), **made), "gpu:h200:1x1x1")
    exports = {name: f"export of {name}" for name in made}
    adapters = {
        role: {os.path.basename(origin[0]) for origin in origins if origin[1] == "adapter"}
        for role, origins in held["ppo"].items()
    }
    assert adapters["policy"] == adapters["ref"] == {exports["sft"]}
    assert adapters["value"] == adapters["reward"] == {exports["reward"]}
    bases = {origin for origins in held["ppo"].values() for origin in origins if origin[1] != "adapter"}
    assert {os.path.realpath(origin[0]) for origin in bases} == {os.path.realpath(model)}

"""Runs that train an adapter: roles share one frozen base, checkpoints hold what is trained, exports compute it."""

import json
import re
import shlex

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from stage_world import rows, stage_of, state_of, tensors

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.adapter import is_adapter
from jaxalign.ops.trees import by_path, join
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.pipeline.named import named_config
from jaxalign.train import trainer
from jaxalign.train.optimizer import check_rate_factors
from jaxalign.train.stage import stage_warnings
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES

FIELDS = {
    "num_train_steps": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "adapter.rank": 4,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
}
VARIED = {
    "adapter.targets": ("q_proj", r"layers\.(3|4)\.mlp\.down_proj"),
    "adapter.rank_pattern": ((r"layers\.1\.self_attn\.q_proj", 2),),
    "adapter.rslora": True,
}


def made(shared, workdir, algorithm, devices=1, **fields):
    return stage_of(make_config(stories(shared, workdir, algorithm, **FIELDS | fields)), devices)


@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("sft", VARIED),
        ("dpo", {}),
        ("dpo", {"adapter.dora": True}),
        ("dpo", {"algorithm.reference": "cached"}),
        ("reward", {"model.frozen_dtype": "bfloat16"}),
        ("ppo", {}),
    ],
)
def test_a_run(algorithm, more, shared, tmp_path):
    config = make_config(stories(shared, tmp_path / "run", algorithm, **FIELDS | more))
    results = trainer.run(config, devices=jax.devices()[:2])
    assert results["num_compiles"] == 1
    figures = rows(tmp_path / "run")
    losses = [name for name in figures[0] if name.startswith("grad_norm")]
    assert losses and all(row[name] > 0 for row in figures for name in losses)
    if algorithm == "dpo" and "algorithm.reference" not in more:
        assert figures[0]["rewards/margins"] == 0.0 and figures[1]["rewards/margins"] != 0.0
    if algorithm == "ppo":
        assert figures[0]["objective/kl"] == 0.0

    # One base for all roles; gradients and moments of the adapter alone, and of a new scalar head.
    stage = made(shared, tmp_path / "run", algorithm, 2, **more)
    role = stage.program.trained[stage.program.exported]
    held = by_path(role.abstract())
    assert all(is_adapter(path) or path == "score/kernel" for path in held) and held
    sizes, base = results["model_bytes"], num_bytes(role.model.abstract()) - num_bytes(role.abstract())
    assert results["optimizer_bytes"] < 2.1 * sum(num_bytes(r.abstract()) for r in stage.program.trained.values())
    copies = num_bytes(role.abstract()) if more.get("adapter.dora") else 0
    if algorithm != "reward":
        assert sum(sizes.values()) == base + copies + sum(
            num_bytes(r.abstract()) for r in stage.program.trained.values()
        )
    else:
        assert sizes["reward"] < 0.6 * base + num_bytes(role.abstract())

    # What was learned, and nothing else, is in checkpoints.
    saved = by_path(state_of(stage, 2).params[stage.program.exported])
    assert saved.keys() == held.keys()
    assert any(np.any(np.asarray(x)) for path, x in saved.items() if path.endswith("lora_b"))


def test_the_export_is_what_was_trained(shared, tmp_path):
    config = make_config(stories(shared, tmp_path / "run", "sft", **FIELDS | VARIED))
    trainer.run(config, devices=jax.devices()[:1])
    stage = made(shared, tmp_path / "run", "sft", **VARIED)
    policy = stage.program.trained["policy"]
    model, params = hf.load(tmp_path / "run" / "export", dtype="float32", param_dtype="float32", remat="none")
    rows_ = jax.tree.map(np.asarray, stage.dataset.batch(0).rows)
    start = policy.rest.load()
    trained = join(state_of(stage, 2).params["policy"], start)
    mine = policy.model.apply(trained, rows_)[0]
    np.testing.assert_allclose(model.apply(params, rows_)[0], mine, rtol=0, atol=2e-5)
    assert np.abs(np.asarray(policy.model.apply(start, rows_)[0]) - mine).max() > 1e-3


def test_one_device_and_eight_give_the_same_adapter(shared, tmp_path):
    found = []
    for devices in (1, 8):
        fields = FIELDS | VARIED | {"batch_size": 8, "grad_accum_steps": 1, "model.dtype": "float64"}
        with jax.enable_x64(True):
            run = tmp_path / str(devices)
            config = make_config(stories(shared, run, "dpo", **fields | {"model.param_dtype": "float64"}))
            trainer.run(config, devices=jax.devices()[:devices])
            stage = made(shared, run, "dpo", devices, **fields | {"model.param_dtype": "float64"})
            found.append(by_path(jax.device_get(state_of(stage, 2).params["policy"])))
    for path, one in found[0].items():
        np.testing.assert_allclose(found[1][path], one, rtol=0, atol=1e-9, err_msg=path)


def test_a_killed_run_resumes_to_the_same_bits_and_not_on_another_base(shared, tmp_path):
    whole = make_config(stories(shared, tmp_path / "whole", "sft", **FIELDS | {"optimizer.schedule": "constant"}))
    trainer.run(whole, devices=jax.devices()[:1])
    fields = FIELDS | {"optimizer.schedule": "constant", "num_train_steps": 1}
    trainer.run(make_config(stories(shared, tmp_path / "cut", "sft", **fields)), devices=jax.devices()[:1])
    longer = make_config(stories(shared, tmp_path / "cut", "sft", **fields | {"num_train_steps": 2}))
    trainer.run(longer, devices=jax.devices()[:1])
    one, other = (tensors(tmp_path / name / "export") for name in ("whole", "cut"))
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)

    moved = tmp_path / "base"
    model, params = hf.load(
        shared / "models" / "stories260k-llama", dtype="float32", param_dtype="float32", remat="none"
    )
    params["norm"]["scale"] = params["norm"]["scale"] * 2
    hf.save(moved, model, params, source=shared / "models" / "stories260k-llama")
    for file in (tmp_path / "cut" / "config.json",):
        file.write_text(file.read_text().replace(str(shared / "models" / "stories260k-llama"), str(moved)))
    again = make_config(
        stories(shared, tmp_path / "cut", "sft", **fields | {"num_train_steps": 3, "model.path": str(moved)})
    )
    with pytest.raises(InputError, match=r"the weights of model\.path"):
        trainer.run(again, devices=jax.devices()[:1])


def test_a_rank_beyond_a_kernels_smaller_side_is_told(shared, tmp_path):
    """Of five layers, 64 wide, keys and values are 32 wide: 16 of 48 are for nothing."""

    def told(**fields):
        return [said for said in stage_warnings(made(shared, tmp_path / "run", "sft", **fields)) if "beyond" in said]

    assert told(**{"adapter.rank": 32}) == []
    wasted = 2 * 5 * 16 * (64 + 32) * 4
    (said,) = told(**{"adapter.rank": 48, "adapter.rank_pattern": (("q_proj", 8),)})
    assert "rank 48 is beyond the smaller side of attention/key (64 x 32), attention/value (64 x 32)" in said
    assert f"{wasted / 2**20:.3g} MiB" in said
    (flag,) = re.findall(r"--config\.adapter\.rank_pattern=('.*')\)", said)
    pattern = tuple(map(tuple, json.loads(*shlex.split(flag))))
    assert pattern == (("attention/key", 32), ("attention/value", 32), ("q_proj", 8))
    assert told(**{"adapter.rank": 48, "adapter.rank_pattern": pattern}) == []


def test_norms_and_heads_on_request(shared, tmp_path):
    stage = made(shared, tmp_path / "run", "sft", **{"model.train": (r"layers/\w*norm", "embed")})
    held = by_path(stage.program.trained["policy"].abstract())
    assert {path for path in held if not is_adapter(path)} == {
        "embed/embedding", "layers/attention_norm/scale", "layers/mlp_norm/scale",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"model\.train 'mlp_nrm' matches no parameter") as caught:
        made(shared, tmp_path / "other", "sft", **{"model.train": ("mlp_nrm",)})
    assert "layers/mlp_norm/scale" in caught.value.fix
    frozen = made(shared, tmp_path / "third", "sft", **{"adapter.rank": 0, "model.train": ("layers/mlp",)})
    assert {p.split("/")[1] for p in by_path(frozen.program.trained["policy"].abstract())} == {"mlp"}
    assert frozen.program.passes < 3


def test_learning_rates_of_an_adapter_are_ten_times_as_large():
    flags = ["--model=m", "--data=a.jsonl", "--rank=8"]
    assert named_config("dpo", flags)[0].optimizer.learning_rate == 1e-5
    assert named_config("dpo", [*flags, "--learning_rate=3e-6"])[0].optimizer.learning_rate == 3e-6
    assert defaults("sft", adapter=8).optimizer.learning_rate == 2e-4
    config = defaults("dpo", adapter=8)
    assert not [said for said in validate(config, inputs=False) if "learning_rate" in said]
    config.optimizer.learning_rate = 1e-6
    (said,) = [said for said in validate(config, inputs=False) if "learning_rate" in said]
    assert said == "optimizer.learning_rate is 1e-06; guides for dpo with an adapter give 5e-06 to 5e-05"


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("adapter.rank", -1, "adapter.rank is -1"),
        ("adapter.targets", (), "adapter.targets is empty"),
        ("adapter.targets", (3,), "adapter.targets holds 3"),
        ("adapter.rank_pattern", ("q_proj",), "adapter.rank_pattern holds 'q_proj'"),
        ("adapter.rank_pattern", (("q_proj", 0),), "gives 'q_proj' 0"),
        ("adapter.alpha_pattern", (("q_proj", float("nan")),), "gives 'q_proj' nan"),
        ("optimizer.rate_factors", (("lora_b", "x"),), "gives 'lora_b' 'x'"),
        ("optimizer.rate_factors", (("*", 16.0),), r"optimizer\.rate_factors '\*': nothing to repeat"),
        ("optimizer.rate_factors", (("(?i)lora_b", 16.0),), r"'\(\?i\)lora_b': global flags"),
        ("model.param_dtype", "bfloat16", "bfloat16 weights at a learning rate of 1e-05"),
    ],
)
def test_bad_fields(field, value, said):
    config = defaults("dpo", adapter=8)
    section, leaf = field.split(".")
    config[section][leaf] = value
    with pytest.raises(InputError, match=said):
        validate(config, inputs=False)


@pytest.mark.parametrize("found, nearest", [("lora_bb", "lora_b"), ("attention/quer/lora_b", "attention/query/lora_b")])
def test_a_rate_factor_of_nothing_that_is_trained(shared, tmp_path, found, nearest):
    fields = {"optimizer.rate_factors": (("lora_a", 2.0), (found, 16.0))}
    with pytest.raises(InputError, match=f"rate_factors '{found}' matches no trained parameter") as caught:
        made(shared, tmp_path, "sft", **fields)
    assert f'{nearest}", 16.0)' in caught.value.fix
    assert "layers/attention/key/lora_a" in caught.value.expected


def test_a_rate_factor_of_one_role_is_enough():
    policy, value = {"lora_a": 1}, {"score": {"kernel": 1}}
    check_rate_factors([("score", 10.0)], [policy, value])
    with pytest.raises(InputError, match="'score' matches no trained parameter"):
        check_rate_factors([("score", 10.0)], [policy])


def test_fields_of_an_adapter_without_one_are_told():
    config = defaults("dpo")
    config.adapter.dora = True
    assert "adapter.dora is True without effect: it is for a positive adapter.rank" in validate(config, inputs=False)


def test_a_factor_of_the_learning_rate_by_path(shared, tmp_path):
    found = []
    for factors in ((), (("lora_b", 4.0),)):
        fields = {"num_train_steps": 1, "optimizer.name": "sgd", "optimizer.b1": 0.0, "optimizer.max_grad_norm": 0.0}
        stage = made(shared, tmp_path / str(len(factors)), "sft", **fields | {"optimizer.rate_factors": factors})
        state = stage.start()
        before = by_path(jax.device_get(state.params["policy"]))
        batch = jax.tree.map(jax.numpy.asarray, stage.dataset.batch(0))
        with jax.set_mesh(stage.mesh):
            after = by_path(jax.device_get(stage._train_step(state, stage.frozen(), batch)[0].params["policy"]))
        found.append({path: after[path] - before[path] for path in before})
    path = "layers/attention/query/lora_b"
    assert np.abs(found[0][path]).max() > 0
    np.testing.assert_allclose(found[1][path], 4 * found[0][path], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found[1][path.replace("_b", "_a")], found[0][path.replace("_b", "_a")], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model.train": ("layers/mlp/up",)}, "up_proj is trained whole, and beside it an update of it"),
        ({"model.train": ("layers/attention/query",), "family": "phi3"}, "qkv_proj is trained whole|is not"),
        ({"adapter.targets": ("attention/query",), "adapter.dora": True, "family": "phi3"}, "some parts of .*qkv_proj"),
        ({"model.train": ("layers/mlp_norm/scale",), "family": "gpt2"}, "mlp_norm/bias is not"),
    ],
)
def test_what_could_not_be_written_at_the_end_is_refused_before_training(fields, said, shared, tmp_path):
    fields = dict(fields)
    if family := fields.pop("family", None):
        config = CASES[family] | {"vocab_size": 512}
        tiny.write(tmp_path / "model", config, tiny.tensors(config))
        for file in (shared / "models" / "stories260k-llama").glob("*token*"):
            (tmp_path / "model" / file.name).symlink_to(file)
        fields |= {"model.path": str(tmp_path / "model"), "data.max_length": 32}
    with pytest.raises(InputError, match="PEFT has no form") as error:
        made(shared, tmp_path / "run", "sft", **fields)
    assert re.search(said, str(error.value)), error.value

"""Adapters over frozen kernels in few bits (QLoRA): the base stays as it was, step 0 is the reference, any mesh is one.

Logits of stories260k-llama, a small model of wide numbers, differ from those of its float32 kernels by 1.0 % (int8) and
15 % (nf4) of their standard deviation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_child import make_config, stories
from test_adapters import FIELDS, made, rows, state_of

from jaxalign.config import defaults, validate
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.adapter import is_adapter
from jaxalign.models.quantised import kernel_at
from jaxalign.ops.quantised import quantise
from jaxalign.ops.trees import by_path, join
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import embed_dim, param_shardings
from jaxalign.train import trainer
from jaxalign.train.stage import stage_warnings

OPTIONS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}


def stories_of(shared, **options):
    return hf.load(shared / "models" / "stories260k-llama", **OPTIONS | options)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_kernels_are_quantised_as_they_are_read_on_any_mesh(kind, shared):
    model, params = stories_of(shared, quantised=kind)
    plain = by_path(stories_of(shared)[1])
    found = by_path(params)
    for path, kernel in plain.items():
        if not (path.startswith("layers/") and path.endswith("kernel")):
            np.testing.assert_array_equal(found.pop(path), kernel)
            continue
        for i, layer in enumerate(np.asarray(kernel)):
            for name, part in quantise(layer, kind, embed_dim(path)).items():
                np.testing.assert_array_equal(found[f"{path}_{name}"][i], part)
        for name in [name for name in found if kernel_at(name) == path]:
            del found[name]
    assert not found
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, jax.devices())
    split = stories_of(shared, quantised=kind, shardings=lambda tree: param_shardings(mesh, tree))[1]
    jax.tree.map(np.testing.assert_array_equal, split, params)
    codes = split["layers"]["attention"]["query"]["kernel_codes"]
    assert codes.addressable_shards[0].data.shape == (5, codes.shape[1], 4, 2)  # blocks along D, which stays whole
    assert jax.tree.map(jnp.shape, model.init(jax.random.key(0))) == jax.tree.map(jnp.shape, params)


def test_a_model_from_scratch_is_the_quantised_one(shared):
    options = OPTIONS | {"key": jax.random.key(3)}
    path = shared / "models" / "stories260k-llama"
    whole = hf.from_scratch(path, **options)[1]["layers"]["mlp"]["down"]["kernel"]
    few = hf.from_scratch(path, quantised="int8", **options)[1]["layers"]["mlp"]["down"]
    for i, layer in enumerate(np.asarray(whole)):
        np.testing.assert_array_equal(few["kernel_codes"][i], quantise(layer, "int8", 1)["codes"])


@pytest.mark.parametrize("kind, most", [("int8", 0.015), ("nf4", 0.2)])
def test_logits_stay_near_those_of_whole_kernels(kind, most, shared, tmp_path):
    stage = made(shared, tmp_path / "run", "sft")
    rows_ = jax.tree.map(np.asarray, stage.dataset.batch(0).rows)

    def logits(model, params):
        return np.asarray(model.apply(params, rows_)[0] @ model.head(params))

    few = stories_of(shared, quantised=kind)
    mine, exact = logits(*few), logits(*stories_of(shared))
    error = np.sqrt(np.mean((mine - exact) ** 2)) / exact.std()
    assert error < most, error
    # An export holds these very kernels.
    hf.save(tmp_path / "whole", *few, source=shared / "models" / "stories260k-llama")
    np.testing.assert_allclose(logits(*hf.load(tmp_path / "whole", **OPTIONS)), mine, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("sft", {"model.frozen_dtype": "nf4"}),
        ("dpo", {"model.frozen_dtype": "nf4", "model.remat": "full"}),
        ("dpo", {"model.frozen_dtype": "int8", "model.dtype": "bfloat16", "model.remat": "dots"}),
        (
            "dpo",
            {
                "model.frozen_dtype": "nf4",
                "adapter.dora": True,
                "adapter.targets": (r"layers\.(1|3)\.self_attn\.q_proj", "up_proj"),
            },
        ),
        ("reward", {"model.frozen_dtype": "nf4"}),
        ("ppo", {"model.frozen_dtype": "nf4"}),
        ("sft", {"model.frozen_dtype": "nf4", "adapter.rank": 0, "model.train": ("embed", r"layers/\w*norm")}),
    ],
)
def test_a_run(algorithm, more, shared, tmp_path):
    more = FIELDS | {"num_train_steps": 3} | more
    results = trainer.run(make_config(stories(shared, tmp_path / "run", algorithm, **more)), devices=jax.devices()[:2])
    assert results["num_compiles"] == 1
    figures = rows(tmp_path / "run")
    assert all(row[name] > 0 for row in figures for name in row if name.startswith("grad_norm"))
    if algorithm == "dpo":
        assert figures[0]["rewards/margins"] == 0.0 and figures[2]["rewards/margins"] != 0.0
    if algorithm == "ppo":
        assert figures[0]["objective/kl"] == 0.0

    stage = made(shared, tmp_path / "run", algorithm, 2, **more)
    role = stage.program.trained[stage.program.exported]
    saved = by_path(state_of(stage, 3).params[stage.program.exported])
    assert saved.keys() == by_path(role.abstract()).keys() and not any(map(kernel_at, saved))
    if "model.train" in more:
        rows_ = jax.tree.map(np.asarray, stage.dataset.batch(0).rows)
        trained = join(jax.device_get(state_of(stage, 3).params["policy"]), role.rest.load())
        model, exported = hf.load(tmp_path / "run" / "export", **OPTIONS)
        mine = role.model.apply(trained, rows_)[0]
        np.testing.assert_allclose(model.apply(exported, rows_)[0], mine, rtol=0, atol=2e-5)


def test_a_step_leaves_codes_as_they_were(shared, tmp_path):
    stage = made(shared, tmp_path / "run", "dpo", **{"model.frozen_dtype": "nf4"})
    frozen = stage.frozen()
    before = jax.tree.map(np.array, frozen)
    assert (
        frozen["ref"]["layers"]["mlp"]["up"]["kernel_codes"] is frozen["policy"]["layers"]["mlp"]["up"]["kernel_codes"]
    )
    batch = jax.tree.map(jnp.asarray, stage.dataset.batch(0))
    with jax.set_mesh(stage.mesh):
        after = stage._train_step(stage.start(), frozen, batch)[0]
    assert all(map(is_adapter, by_path(after.params["policy"])))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_one_device_and_eight_give_the_same_adapter(shared, tmp_path):
    found = []
    for devices in (1, 8):
        fields = FIELDS | {"batch_size": 8, "grad_accum_steps": 1, "model.dtype": "float64"}
        fields |= {"model.param_dtype": "float64", "model.frozen_dtype": "nf4"}
        with jax.enable_x64(True):
            run = tmp_path / str(devices)
            trainer.run(make_config(stories(shared, run, "dpo", **fields)), devices=jax.devices()[:devices])
            stage = made(shared, run, "dpo", devices, **fields)
            found.append(by_path(jax.device_get(state_of(stage, 2).params["policy"])))
    for path, one in found[0].items():
        np.testing.assert_allclose(found[1][path], one, rtol=0, atol=1e-9, err_msg=path)


@pytest.mark.parametrize(
    "pattern, said",
    [
        (
            "layers/mlp",
            r"model\.train 'layers/mlp' trains layers/mlp/\w+/kernel, which model\.frozen_dtype=nf4 keeps",
        ),
        ("kernel", r"model\.train 'kernel' trains layers/"),
        ("kernel_codes", r"model\.train 'kernel_codes' matches no parameter"),
    ],
)
def test_kernels_in_few_bits_are_not_trained(pattern, said, shared, tmp_path):
    with pytest.raises(InputError, match=said):
        made(shared, tmp_path / "run", "sft", **{"model.frozen_dtype": "nf4", "model.train": (pattern,)})


def test_few_bits_where_nothing_is_frozen_are_refused():
    config = defaults("sft")
    config.model.frozen_dtype = "int8"
    with pytest.raises(InputError, match=r"model\.frozen_dtype is 'int8', and every parameter is trained"):
        validate(config, inputs=False)
    config.adapter.rank = 8
    validate(config, inputs=False)


def test_a_reference_in_few_bits_beside_a_policy_in_full(shared, tmp_path):
    stage = made(shared, tmp_path / "run", "dpo", **{"model.frozen_dtype": "int8", "adapter.rank": 0})
    assert stage.program.trained["policy"].model.config.quantised is None
    assert stage.program.frozen["ref"].model.config.quantised == "int8"
    (said,) = [w for w in stage_warnings(stage) if "do not begin at 0" in w]
    assert "in int8 and the policy's are not" in said

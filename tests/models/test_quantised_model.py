"""Layers that hold their kernels in few bits: the same model, decoded from a cache, and never two kernels in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import adapter as adapters
from jaxalign.models.adapter import Rules, is_adapter
from jaxalign.models.quantised import dequantised
from jaxalign.models.transformer import Model
from jaxalign.ops.trees import join, split
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rollout.layout import decoding_mesh, lay_out, seen_on
from tests.models import tiny_models as tiny

ROWS = tiny.causal(np.random.default_rng(0).integers(3, 60, (2, 9)))
RULES = {"plain": None, "lora": Rules(4, 8.0), "varied": Rules(4, 8.0, rank_pattern=((r"1\.mlp.*", 2),)),
         "dora": Rules(4, 8.0, dora=True)}  # fmt: skip


def few_bits(kind, rules=None, **changes):
    """A quantised model with biases, and its parameters, an adapter's moved away from their start."""
    base = tiny.model(attention_bias=True, mlp_bias=True, **changes)
    adapter = rules and adapters.make(base.config, rules)
    model = Model(dataclasses.replace(base.config, quantised=kind, adapter=adapter))
    rng, params = np.random.default_rng(1), model.init(jax.random.key(0))

    def moved(path, x):
        there = np.asarray(x) != 0 if path[-1].key == "lora_a" else 1
        return x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) * there if is_adapter(path[-1].key) else x

    return model, jax.tree_util.tree_map_with_path(moved, params)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_model_of_the_dequantised_kernels_is_the_same(kind, rules):
    model, params = few_bits(kind, rules)
    plain, layers = model.plain(), dequantised(params["layers"], model.config.embed_dim, np.float32)
    whole = params | {"layers": layers if rules is None else model.config.adapter.merged(layers)}
    assert jax.tree.structure(whole) == jax.tree.structure(plain.abstract())
    hidden = model.apply(params, ROWS)[0]
    np.testing.assert_allclose(plain.apply(whole, ROWS)[0], hidden, rtol=0, atol=2e-5)
    if rules is not None:
        start = model.init(jax.random.key(0))
        base = dataclasses.replace(model, config=dataclasses.replace(model.config, adapter=None))
        np.testing.assert_allclose(
            model.apply(start, ROWS)[0], base.apply(adapters.base(start), ROWS)[0], rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("rules", [RULES["varied"], RULES["dora"]], ids=["lora", "dora"])
def test_decoding_reads_codes_and_equals_the_full_forward(rules):
    model, params = few_bits("nf4", rules)
    whole = np.asarray(model.apply(params, ROWS)[0])
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    decoding = decoding_mesh(mesh, 2)
    split_params = jax.device_put(params, param_shardings(mesh, params))
    with jax.set_mesh(decoding):
        laid = lay_out(model, seen_on(split_params, decoding), mesh)
    codes = laid["layers"][0]["mlp"]["up"]["kernel_codes"]
    assert codes.dtype == jnp.uint8 and codes.addressable_shards[0].data.shape == (16, 24)  # [D / 2, F / 2]
    for own in (lay_out(model, params), laid):
        cache, found = tiny.empty_cache(model.config, 2, 9), []
        for t in range(9):
            step = jax.tree.map(lambda x, t=t: x[:, t : t + 1], ROWS)
            hidden, cache, _ = model.apply(own, step, cache)
            found.append(np.asarray(hidden)[:, 0])
        np.testing.assert_allclose(np.stack(found, 1), whole, rtol=0, atol=1e-5)


def peak(remat, layers, kind):
    """Bytes of temporaries of the gradient of an adapter, few tokens beside large kernels."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "head_dim": 64}
    config = dataclasses.replace(tiny.model(**sizes).config, remat=remat, quantised=kind)
    model = Model(dataclasses.replace(config, adapter=adapters.make(config, Rules(2, 4.0))))
    trained, frozen = split(model.abstract(), is_adapter)
    loss = lambda trained, frozen: jnp.sum(model.apply(join(trained, frozen), ROWS)[0] ** 2)  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(trained, frozen).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_one_layers_kernels_are_there_at_a_time(remat):
    """More layers take no more than their activations, which whole kernels have too; and these lie there besides."""
    of_a_layer = 4 * (4 * 256 * 256 + 3 * 256 * 512)
    few, many = (peak(remat, n, "nf4") for n in (4, 12))
    assert many - few < min(8 * of_a_layer / 4, peak(remat, 20, None) - peak(remat, 12, None) + of_a_layer / 8)
    assert few < 2.5 * of_a_layer

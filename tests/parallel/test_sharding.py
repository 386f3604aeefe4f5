"""The mesh, the table of partitions, batches on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign.errors import InputError
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import make_mesh, mesh_shape


def model_tree(heads=8, kv=4, vocab=32):
    shapes = {
        "embed": {"embedding": (vocab, 16)},
        "layers": {
            "attention_norm": {"scale": (2, 16)},
            "attention": {
                "query": {"kernel": (2, 16, heads, 4)},
                "key": {"kernel": (2, 16, kv, 4), "bias": (2, kv, 4)},
                "value": {"kernel": (2, 16, kv, 4)},
                "out": {"kernel": (2, heads, 4, 16)},
            },
            "mlp": {"gate": {"kernel": (2, 16, 24)}, "up": {"kernel": (2, 16, 24)}, "down": {"kernel": (2, 24, 16)}},
        },
        "norm": {"scale": (16,)},
        "lm_head": {"kernel": (16, vocab)},
        "score": {"kernel": (16, 1)},
    }
    return jax.tree.map(lambda s: jnp.zeros(s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def test_mesh_fills_and_refuses_with_words():
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(InputError, match="data=3 x fsdp=1 x tensor=1 on 8 device"):
        make_mesh({"data": 3, "fsdp": 1, "tensor": 1})
    with pytest.raises(InputError, match="at most one -1"):
        mesh_shape({"data": -1, "fsdp": -1}, 8)
    with pytest.raises(InputError, match="fsdp=-1"):
        mesh_shape({"data": 3, "fsdp": -1}, 8)
    with pytest.raises(InputError, match="model"):
        mesh_shape({"model": 2}, 8)


def test_axes_are_auto():
    assert all(t == jax.sharding.AxisType.Auto for t in make_mesh({"fsdp": -1}).axis_types)


def test_rules_first_match_and_unmatched_raises():
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(mesh, model_tree()))
    assert specs["embed"]["embedding"] == P("tensor", "fsdp")
    assert specs["layers"]["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["norm"]["scale"] == P()
    with pytest.raises(KeyError, match="layers/router/kernel"):
        sharding.param_shardings(mesh, {"layers": {"router": {"kernel": jnp.zeros((2, 3))}}})
    with pytest.raises(ValueError, match="2 dims"):
        sharding.param_shardings(mesh, {"lm_head": {"kernel": jnp.zeros((2, 3, 4))}})


def test_kv_heads_fewer_than_tensor_are_replicated():
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 8})
    tree = model_tree(heads=8, kv=2)
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(mesh, tree))["layers"]["attention"]
    assert specs["query"]["kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["key"]["kernel"] == P(None, "fsdp", None, None)
    assert any("attention/key/kernel keeps its dim of 2 whole" in s for s in sharding.unsplit(mesh, tree))


@pytest.mark.parametrize("tx", [optax.adamw(1e-3), optax.adafactor(1e-3), optax.lion(1e-3), optax.sgd(1e-3, 0.9)])
def test_optimizer_state_follows_its_parameter(tx):
    mesh, params = make_mesh({"data": 1, "fsdp": 2, "tensor": 4}), model_tree()
    state = jax.eval_shape(tx.init, params)
    specs = {
        sharding.path_name(p): s.spec
        for p, s in jax.tree_util.tree_flatten_with_path(sharding.param_shardings(mesh, state))[0]
    }
    same = [s for n, s in specs.items() if n.endswith("mu/lm_head/kernel") or n.endswith("trace/lm_head/kernel")]
    assert all(s == P("fsdp", "tensor") for s in same)
    placed = jax.jit(tx.init, out_shardings=sharding.param_shardings(mesh, state))(params)
    jax.block_until_ready(placed)


def test_put_batch_and_constrain():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    x = sharding.put_batch({"a": np.arange(8)[:, None]}, mesh)["a"]
    assert x.sharding.spec == P(("data", "fsdp")) and x.shape == (8, 1)
    with pytest.raises(InputError, match="batch_size=8"):
        sharding.put_batch(np.zeros((6, 2)), mesh)
    f = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "tensor"))
    np.testing.assert_array_equal(f(np.ones((8, 4))), 2 * np.ones((8, 4)))  # no mesh: nothing happens
    with jax.set_mesh(mesh):
        assert f(jnp.ones((8, 4))).sharding.spec == P(("data", "fsdp"), "tensor")
        # 6 rows: the part of the axes that divides them; 3 columns: none
        assert f(jnp.ones((6, 3))).sharding.spec == P("data")

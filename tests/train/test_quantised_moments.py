"""Moments in 8 bits: codes against lists of all numbers that they can be, steps against float32's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from test_optimizer import section

from jaxalign import config as configuration
from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.models.config import from_hf
from jaxalign.models.transformer import Model
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.train.checkpoints import Checkpoints, abstract
from jaxalign.train.optimizer import kept_in, make_optimizer
from jaxalign.train.quantised_moments import Packed, pack, unpack
from jaxalign.types import Rows, TrainState

MANTISSA = {"mu": 3, "nu": 4}
# Compiles in a third of the time.
COMPILER = {"xla_backend_optimization_level": 0}


def there_and_back(moment, x, count=0):
    """One moment through 8 bits; the other is 0."""
    state = optax.ScaleByAdamState(jnp.int32(0), {"w": x}, {"w": abs(x)})
    packed = jax.jit(pack)(state, count)
    assert getattr(packed.moments, moment)["w"].dtype == {"mu": jnp.int8, "nu": jnp.uint8}[moment]
    return np.asarray(getattr(jax.jit(unpack)(packed), moment)["w"], np.float64)


def numbers(block, moment):
    """All numbers that a block may hold, in float64: 8-bit floats downward from the one that is kept as its largest."""
    bits = MANTISSA[moment]
    floats = [(2**bits + k) / 2**bits * 2.0**e for e in range(-126, 128) for k in range(2**bits)]
    largest = floats.index(np.abs(block).max())
    kept = floats[largest - (126 if moment == "mu" else 254) : largest + 1]
    return np.array([0.0, *kept])


@pytest.mark.parametrize("length", [8, 32, 45, 96])
@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_every_number_becomes_a_neighbour(moment, length):
    random = np.random.default_rng(length)
    wide = 10.0 ** random.uniform(-6, 0, (20, length)) * 10.0 ** random.uniform(-22, 22, (20, 1))
    x = (wide * random.choice([-1, 1] if moment == "mu" else [1], wide.shape)).astype(np.float32)
    found = there_and_back(moment, x)
    assert np.all(np.sign(found) * np.sign(x) >= 0)
    for row, kept in zip(x.astype(np.float64), found, strict=True):
        for i in range(0, length, 32):
            block, codes = np.abs(row[i : i + 32]), np.abs(kept[i : i + 32])
            can_be = numbers(codes, moment)
            upper = np.searchsorted(can_be, block).clip(1, len(can_be) - 1)
            inside = block <= can_be[-1]  # the largest may have been rounded down
            lower = np.where(inside, can_be[upper - 1], can_be[-1])
            assert np.all((codes == lower) | (codes == can_be[upper]))
            reached = block >= can_be[1]
            assert np.all(np.abs(codes - block)[reached] <= block[reached] * 2.0 ** -MANTISSA[moment])
            assert can_be[1] < 2.0**-14.5 * can_be[-1]
            if moment == "nu":
                assert np.all(codes > 0)


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_codes_are_right_on_average(moment):
    x = np.geomspace(1e-6, 1.0, 32, dtype=np.float32)[None]
    draw = jax.jit(jax.vmap(lambda i: _first(unpack(pack({"": _adam(moment, x)}, i))[""], moment)))
    found = np.asarray(draw(jnp.arange(4000)), np.float64).mean(0)
    reached = x[0] > 2.0**-15
    np.testing.assert_allclose(found[0, reached], x[0, reached], rtol=0.003)
    if moment == "mu":  # below, 0 or the reach's end, by chance
        np.testing.assert_allclose(found, x, rtol=0.2)
    else:
        assert np.all(found[0, ~reached] >= x[0, ~reached])


def _adam(moment, x):
    return optax.ScaleByAdamState(jnp.int32(0), {"w": x}, {"w": x})._replace(**{moment: {"w": jnp.asarray(x)}})


def _first(state, moment):
    return getattr(state, moment)["w"]


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_odd_blocks(moment):
    def row(*some):  # a block of these and zeros, and a block of ones
        return np.array([[*some, *[0.0] * (32 - len(some)), *[1.0] * 32]], np.float32)

    np.testing.assert_array_equal(there_and_back(moment, row()), row())
    for odd in (np.nan, np.inf):  # their own block, and no other
        found = there_and_back(moment, row(3.0, odd))
        assert np.all(np.isnan(found[0, :32])) and np.all(found[0, 32:] == 1.0)
    huge, tiny = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    found = there_and_back(moment, row(huge, 1.0, 0.0))
    assert np.isfinite(found).all() and found[0, 0] > 0.93 * huge and found[0, 2] == 0
    assert (found[0, 1] > 0) == (moment == "nu")
    np.testing.assert_allclose(there_and_back(moment, row(3 * tiny, tiny)), row(3 * tiny, tiny), rtol=0.125)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_a_state_takes_a_quarter_and_keeps_small_leaves(name):
    p = {
        "mlp": {"up": {"kernel": jnp.ones((2, 256, 256)), "bias": jnp.ones((2, 256))}},
        "norm": {"scale": jnp.ones(64)},
    }
    p["score"] = {"kernel": jnp.ones((256, 1))}
    whole, eighth = (make_optimizer(section(name=name, state_dtype=d), 0.05, 40) for d in (None, "int8"))
    state = jax.eval_shape(eighth.init, p)
    after = jax.eval_shape(eighth.update, p, state, p)[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert isinstance(state, Packed) and jax.tree.structure(state.moments) == jax.tree.structure(
        jax.eval_shape(whole.init, p)
    )
    for path, x in jax.tree_util.tree_flatten_with_path(state.moments)[0]:
        big = "up" in str(path) and "kernel" in str(path) and name != "adafactor"
        assert x.dtype in ((jnp.int8, jnp.uint8) if big else (jnp.float32, jnp.int32)), path
    if name != "adafactor":
        assert num_bytes(state) < 0.275 * num_bytes(jax.eval_shape(whole.init, p))


def regression():
    """A least-squares problem whose columns differ by four decades, so that second moments differ by eight."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((256, 64)) * np.geomspace(1e-2, 1.0, 64), jnp.float32)
    w = jnp.asarray(random.standard_normal((8, 64)), jnp.float32)
    return {"kernel": jnp.zeros((8, 64))}, lambda p: jnp.mean((x @ (p["kernel"] - w).T) ** 2)


def descend(tx, steps=300):
    p, loss = regression()

    def body(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), (value, jnp.max(jnp.abs(updates["kernel"])))

    (p, _), (values, largest) = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, steps))(p)
    return np.asarray(p["kernel"]), np.asarray(values), np.asarray(largest)


def test_adamw_follows_float32_where_a_linear_code_does_not():
    rate = 0.01
    fields = {"schedule": "constant", "max_grad_norm": 0.0}
    whole, eighth = (make_optimizer(section(state_dtype=d, **fields), rate, 300) for d in (None, "int8"))
    (p, losses, largest), (q, near, steps) = descend(whole), descend(eighth)
    # A weight can go 300 x 0.01; where 8 bits bring it is a tenth of that away at most, a hundredth on average.
    assert np.abs(p - q).max() < 0.3 and np.abs(p - q).mean() < 0.03
    assert steps.max() < 1.2 * largest.max() and abs(near[-1] - losses[-1]) < 0.001 * losses[0]

    def linear(x):
        scale = jnp.max(x.reshape(8, -1, 32), axis=-1, keepdims=True) / 255
        return (jnp.round(x.reshape(8, -1, 32) / scale) * scale).reshape(x.shape)

    def update(grads, state, params=None):
        updates, new = whole.update(grads, state, params)
        return updates, (new[0]._replace(nu=jax.tree.map(linear, new[0].nu)), *new[1:])

    assert descend(optax.GradientTransformation(whole.init, update))[2].max() > 1000 * rate


def test_trap_a_second_moment_in_8_bits_rises_and_falls_as_it_should():
    """Rounded to the nearest it would stop at a fraction of where it belongs, and never fall."""
    n, b2 = 4096, 0.999
    tx = kept_in(optax.chain(optax.scale_by_adam(b2=b2), optax.scale_by_schedule(lambda _: 1.0)), "int8")
    p = {"kernel": jnp.linspace(1.0, 2.0, n)}  # so many mantissas

    @jax.jit
    def run(state, size):
        return jax.lax.fori_loop(0, 3000, lambda _, s: tx.update({"kernel": size * p["kernel"]}, s)[1], state)

    state, level = tx.init(p), 0.0
    for size in (3.0, 1.0):
        state = run(state, size)
        level = size**2 + (level - size**2) * b2**3000
        found = np.asarray(unpack(state)[0].nu["kernel"], np.float64) / np.asarray(p["kernel"], np.float64) ** 2
        np.testing.assert_allclose(found.mean(), level, rtol=0.01)  # right on average
        assert found.std() < 0.2 * level


@pytest.mark.parametrize("vocabulary", [128, 96])  # tensor = 2 gives each part two blocks, or one and a half
def test_split_over_a_mesh_it_is_the_same_and_moves_nothing(vocabulary):
    random = np.random.default_rng(1)
    shapes = {
        "embed": {"embedding": (96, 128)},  # tensor, fsdp
        "layers": {
            "attention": {"query": {"kernel": (2, 128, 4, 32)}},  # fsdp, tensor
            "mlp": {"down": {"kernel": (2, 64, 128)}},
            "norm": {"scale": (2, 128)},
        },
        "lm_head": {"kernel": (128, vocabulary)},  # fsdp, tensor
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda: jax.tree.map(lambda s: random.standard_normal(s).astype(np.float32), shapes, is_leaf=is_shape)  # noqa: E731
    p, grads = draw(), [draw() for _ in range(3)]
    tx = make_optimizer(section(state_dtype="int8", max_grad_norm=0.0), 0.01, 40)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})

    start = jax.jit(tx.init)(p)

    def run(place):
        where = place(p), place(start), place(p)
        state, weights = jax.device_put((start, p), where[1:])
        update = jax.jit(tx.update, in_shardings=where, out_shardings=where[:2]).lower(p, start, p).compile()
        for g in grads:
            updates, state = jax.block_until_ready(update(jax.device_put(g, where[0]), state, weights))
        return updates, state, update.as_text()

    one = run(lambda tree: jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree))
    many = run(lambda tree: param_shardings(mesh, tree))
    codes = many[1].moments[0].nu["embed"]["embedding"]
    assert codes.sharding.spec == PartitionSpec("tensor", "fsdp") and codes.addressable_shards[0].data.shape == (48, 32)
    assert many[1].scales[0].nu["embed"]["embedding"].addressable_shards[0].data.shape == (48, 1)
    for a, b in zip(*map(jax.tree.leaves, (one[1], many[1])), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one[0], many[0])
    moved = re.findall(r"= .*(?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter).*\(.*", many[2])
    assert bool(moved) == (vocabulary == 96), moved  # but for blocks that the split cuts


def test_a_tiny_model_learns_as_with_float32_and_goes_on_from_a_checkpoint_bit_by_bit(tmp_path):
    hf = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Model(from_hf(hf, dtype="float32", param_dtype="float32", remat="none"))
    # Each token follows from the one before: a table to learn by heart.
    table = np.random.default_rng(3).permutation(64)
    tokens = np.zeros((8, 33), np.int32)
    tokens[:, 0] = np.arange(8) * 7
    for i in range(32):
        tokens[:, i + 1] = table[tokens[:, i]]
    start = np.zeros((8, 32), np.int32)
    rows = Rows(tokens[:, :-1], start + np.arange(32), start, start + np.arange(1, 33))

    def loss(params):
        logits = model.apply(params, rows)[0] @ model.head(params)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def trainer(dtype):
        tx = make_optimizer(section(state_dtype=dtype, schedule="constant"), 3e-3, 60)

        def body(carry, _):
            params, opt = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), value

        return tx, jax.jit(lambda carry: jax.lax.scan(body, carry, None, 30), compiler_options=COMPILER)

    ends, params = {}, jax.jit(model.init)(jax.random.key(0))
    for dtype in (None, "int8"):
        tx, run = trainer(dtype)
        half, first = run((params, jax.jit(tx.init)(params)))
        whole, last = run(half)
        ends[dtype] = float(first[0]), float(last[-1])
    assert ends[None][0] > 4.0 and ends[None][1] < 0.5  # float32 has learned it
    assert abs(ends["int8"][1] - ends[None][1]) < 0.05

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = TrainState(jnp.int32(30), *half, {}, jnp.int32(30))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(30, state, {}, {}, checkpoints.checked(30, state))
    checkpoints.wait()
    back = checkpoints.restore(30, abstract(state, jax.tree.map(lambda _: device, state)))[0]
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, run((back.params, back.opt))[0], whole)


def test_a_configuration_may_ask_for_it():
    c = defaults("sft")
    c.workdir, c.model.path, c.data.sources, c.optimizer.state_dtype = "runs/x", "model", ("data.jsonl",), "int8"
    configuration.validate(c)
    c.optimizer.state_dtype = "int4"
    with pytest.raises(InputError, match="int8"):
        configuration.validate(c)

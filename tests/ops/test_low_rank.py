"""The product with a kernel and its low-rank update, against the update multiplied out; values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.ops.low_rank import LowRank, adapted, column_norms, merged

X, W, A, B, M = (
    np.random.default_rng(0).normal(size=shape) for shape in ((2, 5, 3, 4), (3, 4, 2, 6), (3, 4, 2), (2, 2, 6), (2, 6))
)


def by_hand(x, w, a, b, m=None):
    whole = w + jnp.einsum("ijr,rno->ijno", a, b)
    y = jnp.einsum("btij,ijno->btno", x, whole)
    return y if m is None else y * m / jax.lax.stop_gradient(jnp.sqrt(jnp.sum(whole**2, axis=(0, 1))))


@pytest.mark.parametrize("dora", [False, True])
def test_values_and_gradients_equal_the_update_multiplied_out(dora):
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (X, A, B, M)[: 3 + dora]]
        w = jnp.asarray(W)

        def loss(of):
            return lambda x, a, b, *m: jnp.sum(jnp.sin(of(x, a, b, *m)))

        mine = loss(lambda x, *update: adapted(x, w, LowRank(*update), 2))
        theirs = loss(lambda x, a, b, *m: by_hand(x, w, a, b, *m))
        which = tuple(range(len(given)))
        for found, wanted in zip(jax.grad(mine, which)(*given), jax.grad(theirs, which)(*given), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        one = merged(w, LowRank(*given[1:]))
        np.testing.assert_allclose(
            jnp.einsum("btij,ijno->btno", given[0], one), by_hand(given[0], w, *given[1:]), rtol=0, atol=1e-12
        )


def test_column_norms_by_a_loop():
    whole = W.reshape(12, 12) + A.reshape(12, 2) @ B.reshape(2, 12)
    wanted = [sum(v * v for v in whole[:, o]) ** 0.5 for o in range(12)]
    np.testing.assert_allclose(column_norms(W, A, B).reshape(-1), wanted, rtol=1e-6)


def test_the_norm_of_a_column_that_the_update_cancels_is_no_nan():
    a, b = W.reshape(12, 12).copy(), -np.eye(12)
    assert np.all(np.asarray(column_norms(W, a.reshape(3, 4, 12), b.reshape(12, 2, 6))) < 1e-2)


@pytest.mark.parametrize("policy", ["dots_with_no_batch_dims_saveable"])
def test_a_policy_that_keeps_products_keeps_no_second_one_as_wide_as_the_kernels(policy):
    x, w, a, b = (jnp.ones(s) for s in ((7, 4), (4, 9), (4, 2), (2, 9)))
    run = jax.checkpoint(
        lambda x, a, b: jnp.sum(jnp.sin(adapted(x, w, LowRank(a, b), 1))),
        policy=getattr(jax.checkpoint_policies, policy),
    )
    _, backward = jax.vjp(run, x, a, b)
    shapes = [leaf.shape for leaf in jax.tree.leaves(backward)]
    assert shapes.count((7, 9)) == 1 and shapes.count((7, 2)) == 1

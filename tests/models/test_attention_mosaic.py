"""The Mosaic kernels of attention, interpreted on a CPU, against the plain backend: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted
from test_attention import problem
from test_attention_kernels import check

from jaxalign.ops.attention import attention


@pytest.mark.parametrize(
    "dtype, T, S, N, K, H, kinds",
    [
        (
            jnp.bfloat16,
            100,
            300,
            2,
            1,
            64,
            ("pair", "random"),
        ),  # more blocks of keys than stages, two heads to share them
        (jnp.float16, 150, 150, 1, 1, 96, ("packed",)),  # several blocks of queries, a head that is padded
    ],
)
def test_equals_plain_with_gradients(dtype, T, S, N, K, H, kinds):
    with interpreted():
        check("mosaic", problem(np.random.default_rng(0), len(kinds), T, S, N, K, H, *kinds), dtype)


def test_reads_no_block_that_is_not_seen():
    """What is not a number outside the blocks of the intervals does not show."""
    q, k, v, start, end = problem(np.random.default_rng(1), 1, 128, 512, 1, 1, 64, "random")
    start, end = start % 128 + 128, end % 128 + 257
    hidden = np.full_like(k, np.nan)
    hidden[:, 128:384] = 0
    run = functools.partial(attention, start_BT=start, end_BT=end)
    given = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    poisoned = [given[0], *(x + jnp.asarray(hidden, x.dtype) for x in given[1:])]
    with interpreted():
        found = jax.jit(functools.partial(run, backend="mosaic"))(*poisoned)
    wanted = run(*(x.astype(jnp.float32) for x in given), backend="plain")
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=0.02)

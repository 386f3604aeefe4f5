"""Every attention backend against the plain one, values and gradients, and how fast each is."""

from part import SMOKE, emit, guarded, left, seconds_of, share, stand_in_for_chex, time_for

stand_in_for_chex()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from batches import pairs, texts  # noqa: E402
from predicted import beside  # noqa: E402

from jaxalign.ops.attention import attention  # noqa: E402

BACKENDS = ("plain", "blocked", "triton") + (() if SMOKE else ("mosaic",))  # which no CPU steps through in seconds
LENGTH = 128 if SMOKE else 1024
HEADS = ((4, 2, 16),) if SMOKE else ((32, 8, 64), (32, 8, 128))  # queries, keys, size: of the 1B and the 8B shape


def rows_of(kind: str, length: int, batch: int = 2):
    """Which keys each token sees: attend_start and attend_end [B, T]."""
    if kind == "shared prompts":
        rows = pairs(99, rows=batch, length=2 * length // 3, prompt=length // 3, shared=True).rows
    else:
        rows = texts(99, rows=batch, length=length, parts=5 if kind == "packed" else 1).rows
    start, end = jnp.asarray(rows.attend_start), jnp.asarray(rows.attend_end)
    if kind == "window":
        start = jnp.maximum(start, end - length // 4)
    return start, end


def inputs(heads, batch: int, length: int, dtype):
    N, K, H = heads
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((N, H), (K, H), (K, H), (N, H))
    return [jax.random.normal(k, (batch, length, *s), dtype) for k, s in zip(keys, sizes, strict=True)]


def both_ways(backend: str):
    """Output and the gradients of q, k, v."""

    @jax.jit
    def run(q, k, v, d_out, start, end):
        out, back = jax.vjp(lambda q, k, v: attention(q, k, v, start, end, backend=backend), q, k, v)
        return out, *back(d_out)

    return run


def errors(found, wanted) -> list[float]:
    """Relative distance of output and of each gradient, by norm."""
    wide = [[np.asarray(x, np.float64) for x in xs] for xs in (found, wanted)]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(*wide, strict=True)]


def compare() -> None:
    for heads in HEADS:
        for kind in ("causal", "packed", "shared prompts", "window"):
            start, end = rows_of(kind, LENGTH)
            length = start.shape[1]
            exact = inputs(heads, 2, length, jnp.bfloat16)
            # The same numbers in float32: what bfloat16 arithmetic is to come near to.
            wanted = both_ways("plain")(*(x.astype(jnp.float32) for x in exact), start, end)
            usual = max(errors(both_ways("plain")(*exact, start, end), wanted))
            for backend in BACKENDS:
                case = f"{backend}, head {heads[2]}, {kind}, bf16"
                with guarded(case, fails=True):
                    worst = max(errors(both_ways(backend)(*exact, start, end), wanted))
                    most = max(2 * usual, 2.0**-8)
                    emit(case, worst, "relative", ok=bool(worst <= most), note=f"plain itself {usual:.1e}")


def speed() -> None:
    sizes = ((2, 128),) if SMOKE else ((8, 2048), (2, 8192))
    for heads in HEADS:
        for batch, length in sizes:
            for kind in ("packed",) if SMOKE else ("causal", "packed"):
                start, end = rows_of(kind, length, batch)
                seen = int(jnp.sum(end - start))
                data = inputs(heads, batch, length, jnp.bfloat16)
                for backend in BACKENDS:
                    case = f"{backend}, head {heads[2]}, {batch} x {length}, {kind}, both ways"
                    # Plain holds B x N x T x T numbers several times over.
                    if backend == "plain" and length > 4096:
                        continue
                    if not time_for(case, 6) or left() < 3:
                        continue
                    with guarded(case):
                        given = (*data, start, end)
                        run = both_ways(backend).lower(*given).compile()
                        taken = seconds_of(lambda r=run, g=given: r(*g), jax.block_until_ready, at_most=1.0)
                        # Two products forward, five backward (FlashAttention-2 counts them so), of what is visible.
                        tflops = 1e-12 * 3.5 * 4 * seen * heads[0] * heads[2] / taken
                        expected = beside(taken, (run, 1), visible=seen / start.size / length)
                        emit(case, 1e3 * taken, "ms", tflops=tflops, share=share(tflops), **expected)


if __name__ == "__main__":
    compare()
    speed()

"""The machine's float32 matrix ceiling: what XLA's products reach at several sizes, as a turn of its own."""

import time

from turns import Turns

turns = Turns()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

turns.imported("jax", "jaxlib")
SIZES = ((2048, 512, 1376), (2048, 256, 688), (1024, 1024, 1024), (2048, 2048, 2048))
SECONDS = 0.25  # of each size; the best stretch of so many calls counts, since others may use the cores
CALLS = 4


def main() -> None:
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST))
    operands = [
        (jax.random.normal(jax.random.key(0), (m, k)), jax.random.normal(jax.random.key(1), (k, n)))
        for m, k, n in SIZES
    ]
    for pair in operands:
        product(*pair).block_until_ready()
    turns.first_step()
    reached: dict[str, float] = {}
    while True:
        turns.turn(gflops=reached)
        for (m, k, n), pair in zip(SIZES, operands):
            end, best = time.perf_counter() + SECONDS, 0.0
            while (start := time.perf_counter()) < end:
                for _ in range(CALLS):
                    out = product(*pair)
                out.block_until_ready()
                best = max(best, 2e-9 * m * k * n * CALLS / (time.perf_counter() - start))
            reached[f"{m}x{k}x{n}"] = round(best, 1)


main()

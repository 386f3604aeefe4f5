"""What the machine can do, against what `jaxalign plan` assumes: products, a large copy, the gap between two kernels.

Everything else is measured against the first and the second.
"""

from part import CEILINGS, SMOKE, emit, guarded, seconds_of, stand_in_for_chex  # isort: skip  it says which platform

stand_in_for_chex()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from predicted import beside  # noqa: E402

from jaxalign.ops.linear import linear  # noqa: E402


def timed(function, *args):
    """Seconds of a call, and the program that was timed."""
    program = jax.jit(function).lower(*args).compile()
    return seconds_of(lambda: program(*args), jax.block_until_ready), program


def square(n: int, dtype):
    # Random numbers: a card that multiplies zeros runs at a higher clock.
    return [jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2)]


def products(turns: int):
    """A product after the other, by a matrix that keeps the numbers' size."""

    def run(a, b):
        return jax.lax.fori_loop(0, turns, lambda _, a: linear(a, b, 1) * jnp.asarray(len(b) ** -0.5, a.dtype), a)

    return run


def main() -> None:
    n, size, small = (256, 2**20, 16) if SMOKE else (8192, 2**32, 64)
    with guarded("ceilings", fails=True):
        taken, product = timed(products(8), *square(n, jnp.bfloat16))
        CEILINGS["flops"] = 8 * 2 * n**3 / taken
        moved, copy = timed(lambda x: x + 1, jnp.zeros(size // 4, jnp.float32))
        CEILINGS["bytes"] = 2 * size / moved
        case = f"bf16 product, {n} cubed"
        emit(case, 1e-12 * CEILINGS["flops"], "TFLOP/s", ceiling="flops", **beside(taken, (product, 1)))
        case = f"copy of {size / 2**30:g} GiB, read plus written"
        emit(case, 1e-12 * CEILINGS["bytes"], "TB/s", ceiling="bytes", **beside(moved, (copy, 1)))
    with guarded("float32 product"):
        taken, product = timed(products(2), *square(n // 2, jnp.float32))
        emit(f"f32 product, {n // 2} cubed", 0.5e-12 * n**3 / taken, "TFLOP/s", **beside(taken, (product, 1)))
    with guarded("small products"):
        taken, product = timed(products(512), *square(small, jnp.bfloat16))
        emit(f"small products, {small} cubed", 1e6 * taken / 512, "us", **beside(taken, (product, 1)))


if __name__ == "__main__":
    device = jax.local_devices()[0]
    emit("device", note=f"{device.device_kind}, jax {jax.__version__}", device=device.device_kind, jax=jax.__version__)
    main()

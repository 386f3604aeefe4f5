"""What the machine can do: a large bfloat16 product, a large copy. Everything else is measured against these."""

from part import SMOKE, emit, guarded, seconds_of  # isort: skip  it says which platform

import jax
import jax.numpy as jnp


def main() -> None:
    n, size = (256, 2**20) if SMOKE else (8192, 2**32)
    with guarded(f"bf16 product, {n} cubed", fails=True):
        # Random numbers: a card that multiplies zeros runs at a higher clock.
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        product = jax.jit(lambda a, b: jax.lax.fori_loop(0, 8, lambda _, a: jnp.dot(a, b) * jnp.bfloat16(n**-0.5), a))
        taken = seconds_of(lambda: product(a, b), jax.block_until_ready)
        emit(f"bf16 product, {n} cubed", 8 * 2e-12 * n**3 / taken, "TFLOP/s", ceiling="flops")
    del a, b
    with guarded("copy", fails=True):
        x = jnp.zeros(size // 4, jnp.float32)
        copy = jax.jit(lambda x: x + 1)
        taken = seconds_of(lambda: copy(x), jax.block_until_ready)
        emit(f"copy of {size / 2**30:g} GiB, read plus written", 2e-12 * size / taken, "TB/s", ceiling="bytes")


if __name__ == "__main__":
    device = jax.local_devices()[0]
    emit("device", note=f"{device.device_kind}, jax {jax.__version__}", device=device.device_kind, jax=jax.__version__)
    main()

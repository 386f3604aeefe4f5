"""Sizes of blocks of the attention kernels: forward and backward with each that fits, and the best of them."""

import itertools
from collections.abc import Iterator

from part import SMOKE, emit, guarded, seconds_of, share, stand_in_for_chex, time_for

stand_in_for_chex()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from attention import HEADS, both_ways, inputs, rows_of  # noqa: E402

from jaxalign.ops import attention_mosaic, attention_triton  # noqa: E402

MODULES = {"triton": attention_triton} if SMOKE else {"mosaic": attention_mosaic, "triton": attention_triton}
ROOM = 227 * 2**10  # bytes of shared memory that a program of a Hopper may have
BATCH, LENGTH = (1, 128) if SMOKE else (2, 8192)


def sizes_of(backend: str) -> Iterator[dict[str, int]]:
    """Constants of the backend's module."""
    if backend == "mosaic":
        for forward, backward, stages in itertools.product((128, 64), (64, 128), (2, 3)):
            yield {"_FORWARD": forward, "_BACKWARD": backward, "_STAGES": stages}
        return
    sides, warps, stages = ((32,), (4,), (2,)) if SMOKE else ((64, 128, 32), (4, 8), (2, 3))
    for q, k, w, s in itertools.product(sides, sides, warps, stages):
        yield {"_BLOCK_Q": q, "_BLOCK_K": k, "_WARPS": w, "_STAGES": s}


def account(backend: str, sizes: dict[str, int], H: int) -> tuple[int, float]:
    """Bytes of shared memory of the kernel that takes most, and multiplications for each byte fetched of the kernel
    that does fewest: forward two products, three for the gradient of queries, four for those of keys and values.

    Each fetches two blocks of 2 H bytes a row at a time, so what counts is how many rows of its own it has.
    """
    if backend == "mosaic":
        own_q = own_k = attention_mosaic._BLOCK
        fetched, fetched_back, seeing = sizes["_FORWARD"], sizes["_BACKWARD"], sizes["_BACKWARD"]
    else:
        own_q, own_k = sizes["_BLOCK_Q"], sizes["_BLOCK_K"]
        fetched, fetched_back, seeing = own_k, own_k, own_q
    stages = 2 * sizes["_STAGES"]
    rows = max(own_q + stages * fetched, 2 * own_q + stages * fetched_back, 2 * own_k + stages * seeing)
    return 2 * H * rows, min(2 * own_q, 3 * own_q, 4 * own_k) / 4


def candidates(backend: str, H: int) -> list[tuple[float, int, dict[str, int]]]:
    """Those that fit, most multiplications a byte first; of equals, as `sizes_of` has them."""
    counted = [(account(backend, sizes, H), sizes) for sizes in sizes_of(backend)]
    return sorted(((ratio, room, sizes) for (room, ratio), sizes in counted if room <= ROOM), key=lambda c: -c[0])


def sweep(backend: str, heads: tuple[int, int, int]) -> None:
    """One row for each candidate, and one for the fastest."""
    start, end = rows_of("causal", LENGTH, BATCH)
    given = (*inputs(heads, BATCH, LENGTH, jnp.bfloat16), start, end)
    work = 1e-12 * 3.5 * 4 * int(jnp.sum(end - start)) * heads[0] * heads[2]
    found: dict[str, float] = {}
    for ratio, room, sizes in candidates(backend, heads[2]):
        words = ", ".join(f"{name.strip('_').lower()} {n}" for name, n in sizes.items())
        case = f"{backend}, head {heads[2]}, {words}"
        if not time_for(case, 8):
            break
        for name, n in sizes.items():
            setattr(MODULES[backend], name, n)
        jax.clear_caches()
        with guarded(case):
            run = both_ways(backend)
            taken = seconds_of(lambda run=run: run(*given), jax.block_until_ready, at_most=0.5)
            note = f"{room / 2**10:.0f} KiB, {ratio:.0f} multiplications a byte"
            emit(case, 1e3 * taken, "ms", tflops=work / taken, share=share(work / taken), note=note)
            found[case] = taken
    if found:
        best = min(found, key=found.__getitem__)
        emit(f"best: {best}", 1e3 * found[best], "ms", tflops=work / found[best], share=share(work / found[best]))


if __name__ == "__main__":
    for size in HEADS:
        for name in MODULES:
            sweep(name, size)

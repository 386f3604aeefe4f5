"""Memory that a CPU's steps free and take again, in processes of their own: what is set holds for a whole process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from jaxalign.parallel.allocator import keep_freed_memory, return_freed_memory
from jaxalign.parallel.startup import start

start() if "start" in sys.argv else jax.devices()
step = jax.jit(lambda x: jnp.sin(x[:, None] * x) @ x)  # 64 MiB of temporaries
x = jnp.arange(4096.0)
for _ in range(15):  # what other threads begin with may land in the freed piece, and the heap then grows by another
    step(x).block_until_ready()
pages = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# The median: a small array of another thread may land in the freed piece, and one step then makes the heap grow.
pages = sorted(pages)[4]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4 // 1024
held = resident()
return_freed_memory()
print(pages, held - resident())
"""


def run(*args, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *args], env=kept | env, capture_output=True, text=True, check=True, timeout=120
    )
    return [int(x) for x in done.stdout.split()]


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what other C libraries do is left to them")


@linux
def test_a_step_finds_the_memory_of_the_last():
    """A step with 64 MiB of temporary arrays touches 16,384 pages; none are fetched anew, and all can be given back."""
    pages, given_back = run("start")
    assert pages < 500
    assert given_back > 50


@linux
@pytest.mark.parametrize(
    "env", [{"MALLOC_ARENA_MAX": "2"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, {}]
)
def test_left_as_it_is(env):
    """Where a person has chosen, where virtual devices wait for each other, and before anything is started."""
    pages, _ = run(*(["start"] if env else []), **env)
    assert pages > 10_000

"""Compiler options: which platform gets which, what an unknown one does, and that calls keep jax.jit's ways."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.parallel import compiler_options as options
from jaxalign.train.compiled import Compiled


@pytest.fixture
def platform(monkeypatch):
    """Pretends that the default device is of a platform."""
    monkeypatch.setattr(options, "_unknown", set())
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    return lambda name: monkeypatch.setattr(jax, "default_backend", lambda: name)


def test_a_tpu_gathers_beside_its_products(platform):
    platform("tpu")
    found = options.compiler_options()
    assert found["xla_tpu_enable_async_collective_fusion_fuse_all_gather"] is True
    assert found["xla_enable_async_all_gather"] == "true"


def test_many_tokens_take_whole_products(platform):
    platform("tpu")
    few, many = (options.compiler_options(update=True, tokens=n).keys() for n in (2**13, 2**14))
    assert many - few == {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}


def test_sparse_cores_take_whole_products_sooner(platform, monkeypatch):
    platform("tpu")
    v6e = types.SimpleNamespace(
        abstract_device=types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite"), shape={}
    )
    few = options.compiler_options(update=True, tokens=2**11).keys()
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: v6e)
    assert options.compiler_options(update=True, tokens=2**11).keys() - few == {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    }


def test_a_cpus_are_for_updates(platform):
    assert options.compiler_options() == {}
    assert list(options.compiler_options(update=True)) == ["xla_cpu_copy_insertion_use_region_analysis"]


def test_a_gpus_compiler_is_told_of_its_pool(platform, monkeypatch):
    platform("gpu")
    assert options.compiler_options() == {"xla_gpu_memory_limit_slop_factor": 95}  # as XLA has it
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    assert options.pool_share() == 0.92
    assert options.compiler_options() == {"xla_gpu_memory_limit_slop_factor": 117}


def test_an_option_that_the_compiler_does_not_know_is_left_out(platform):
    platform("tpu")  # whose options a CPU's compiler refuses, one after the other
    assert int(options.jit(lambda x: x + 1)(jnp.int32(1))) == 2
    assert options.compiler_options() == {}


def test_of_a_train_step(platform):
    platform("tpu")
    step = Compiled(lambda x: x + 1, "step", donate=(0,))
    assert float(step(jnp.ones(2))[0]) == 2 and step.num_compiles == 1


def test_another_error_is_told():
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        options.without_unknown(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("another")))


def test_calls_are_those_of_jax(platform):
    @functools.partial(options.jit, static_argnames=("n",), donate_argnames=("x",))
    def times(x, *, n):
        """Doc."""
        return n * x

    x = jnp.ones(4)
    np.testing.assert_array_equal(times(x, n=3), np.full(4, 3.0))
    assert x.is_deleted()
    assert times.__doc__ == "Doc." and times._cache_size() == 1
    assert times.lower(jnp.ones(4), n=2).compile()(jnp.ones(4))[0] == 2


def test_inside_of_another_program(platform):
    platform("tpu")  # a program inside another one takes no options
    inner = options.jit(lambda x: x + 1)
    assert int(options.jit(lambda x: 2 * inner(x))(jnp.int32(1))) == 4

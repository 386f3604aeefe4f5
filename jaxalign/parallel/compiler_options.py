"""Options that XLA compiles with, by platform: for training, evaluation, sampling and scoring alike."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax

from jaxalign.parallel.hardware import of_kind

Options = dict[str, Any]

_DEFAULT_SHARE = 0.75  # of a GPU's memory, which JAX's pool takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more

# A TPU gathers the weights of a layer while it multiplies by those of the last one. On a torus of three axes it would
# sum zeros into place instead, which moves twice as much and hides behind nothing.
_TPU: Options = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# SparseCores sum a layer's gradients while the next ones are made. Elsewhere than on these a compiler may know the
# option and nobody has said that it runs.
_SPARSE_CORES: Options = {"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True}
_WITH_SPARSE_CORES = ("TPU v6",)
# Where weights are split but no heads, a TPU's compiler multiplies by them piece by piece as they come, and cuts, turns
# and pads the activations for it: more than half of its traffic.  From so many tokens of a device on, whole products
# take less time (predicted for an 8B model on 8 chips), though their gradients are then summed beside no other work;
# where SparseCores sum them, from an eighth of that on.
_MANY_TOKENS = 2**14
_WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000}
# A layer's gradients go out as each is made.  Joined, they wait whole for the last: compiled for 8 H200, a step of an
# 8B model with a row on each takes 28.0 GiB in place of 17.6; and over a network nothing hides them.
_ONE_BY_ONE: Options = {"xla_gpu_collective_combine_threshold_count": 1}
# Fewer copies of donated parameters and moments that an update reads twice.
_CPU_UPDATE: Options = {"xla_cpu_copy_insertion_use_region_analysis": True}

_unknown: set[str] = set()  # options that another version of the compiler refused


def compiler_options(*, update: bool = False, tokens: int = 0) -> Options:
    """The options for the devices of the ambient mesh, which need not be there, else for the default device.

    On a GPU, XLA computes again what it would otherwise keep as soon as temporary arrays take more than 95 % of what
    arguments and results leave of 80 % of the card; a larger pool is worth more where that grows with it.

    Args:
      update: whether the program is a training step, which takes over its state.
      tokens: of a micro-batch, of each shard of its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = getattr(device, "platform", None) or jax.default_backend()
    found = {"tpu": _TPU, "cpu": _CPU_UPDATE if update else {}}.get(platform, {})
    if platform == "tpu":
        sparse = getattr(device, "device_kind", "").startswith(_WITH_SPARSE_CORES)
        if update and sparse:
            found = found | _SPARSE_CORES
        if tokens >= (_MANY_TOKENS // 8 if sparse else _MANY_TOKENS) and mesh.shape.get("tensor", 1) == 1:
            found = found | _WHOLE_PRODUCTS
    if platform == "gpu":
        share = pool_share(getattr(device, "device_kind", ""))
        found = {"xla_gpu_memory_limit_slop_factor": round(95 * share / _DEFAULT_SHARE)}
        if update and mesh.size > 1:
            found |= _ONE_BY_ONE
    return {name: value for name, value in found.items() if name not in _unknown}


def pool_share(kind: str = "") -> float:
    """The share of a GPU's memory that programs may use.

    Args:
      kind: of a GPU that is not there.
    """
    said = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or os.environ.get("XLA_CLIENT_MEM_FRACTION")
    absent = of_kind(kind) if jax.default_backend() != "gpu" else None
    return float(said) if said else absent.pool if absent else _DEFAULT_SHARE


def without_unknown(call: Callable[[], Any]) -> Any:
    """`call()`, again where the compiler refused an option of `compiler_options`, which then gives it no more.

    Args:
      call: asks for the options, and compiles.
    """
    while True:
        try:
            return call()
        except jax.errors.JaxRuntimeError as error:
            refused = re.search(r"No such compile option: '?(\w+)", str(error))
            if refused is None or refused[1] in _unknown:
                raise
            _unknown.add(refused[1])  # another version of the compiler


class jit:
    """`jax.jit` with the options of the platform that each call is compiled for.

    >>> twice = jit(lambda x: 2 * x)
    >>> int(twice(3))
    6
    """

    def __init__(self, function: Callable, **settings: Any):
        """
        Args:
          function: pure.
          settings: those of `jax.jit`.
        """
        functools.update_wrapper(self, function)
        self._with = functools.lru_cache(lambda options: jax.jit(function, compiler_options=dict(options), **settings))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return self._with(())(*args, **kwargs)  # inside of another program, and compiled with its options
        return without_unknown(lambda: self._compiled_for_here(*args, **kwargs))

    @property
    def _compiled_for_here(self) -> Any:
        return self._with(tuple(compiler_options().items()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled_for_here, name)

"""`jaxalign doctor`: devices, versions, memory, missing extras, and a small compiled step."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator

# Packages without which nothing runs, and what they are for.
CORE = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "ml-collections", "transformers", "tokenizers",
    "datasets", "safetensors", "numpy",
)  # fmt: skip

# (what to look for among installed distributions, what it is for, the command that adds it)
EXTRAS = (
    (("jax-cuda13-plugin", "jax-cuda12-plugin"), "NVIDIA GPUs", "pip install 'jaxalign[cuda]'"),
    (("libtpu",), "TPUs", "pip install 'jaxalign[tpu]'"),
    (("wandb",), "logging to Weights & Biases", "pip install 'jaxalign[wandb]'"),
    (("mlflow",), "logging to MLflow", "pip install 'jaxalign[mlflow]'"),
    (("matplotlib",), "pictures of the quickstart", "pip install 'jaxalign[plots]'"),
    (("tensorboardX",), "logging to TensorBoard", "pip install tensorboardX"),
    (("gcsfs",), "data on gs://", "pip install gcsfs"),
    (("s3fs",), "data on s3://", "pip install s3fs"),
)

OK, NOTE, BAD = "ok", "note", "BAD"


def doctor() -> int:
    """Prints what was found, a line each, with what to do about it.

    Returns:
      0, or 1 where something is wrong that would keep a run from working.
    """
    bad = 0
    for status, subject, text in examine():
        print(f"{status:>4}  {subject:<12} {text}")
        bad += status == BAD
    print(f"{bad} problem{'s' * (bad != 1)}" if bad else "everything that a run needs works here")
    return 1 if bad else 0


def examine() -> Iterator[tuple[str, str, str]]:
    """(status, subject, text) for each thing looked at: `OK`, `NOTE` (fine, but know it) or `BAD`."""
    yield from _system()
    yield from _packages()
    yield from _extras()
    yield from _devices()


def _system() -> Iterator[tuple[str, str, str]]:
    from jaxalign import __version__

    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield (
        (BAD if old else OK),
        "python",
        f"{version}" + (": jaxalign needs 3.11 or newer" if old else f" ({sys.executable})"),
    )
    yield OK, "jaxalign", __version__
    yield OK, "system", f"{platform.platform()}, {os.cpu_count()} CPU cores"
    try:
        import psutil

        memory = psutil.virtual_memory()
        yield OK, "memory", f"{_size(memory.available)} free of {_size(memory.total)}"
        disk = psutil.disk_usage(".")
        yield (OK if disk.free > 1 << 30 else NOTE), "disk here", f"{_size(disk.free)} free of {_size(disk.total)}"
    except ImportError:
        yield NOTE, "memory", "unknown: pip install psutil"


def _packages() -> Iterator[tuple[str, str, str]]:
    found, missing = [], []
    for name in CORE:
        version = _version(name)
        (found if version else missing).append(f"{name} {version}" if version else name)
    yield OK, "packages", ", ".join(found)
    if missing:
        yield BAD, "packages", f"not installed: {', '.join(missing)} (pip install jaxalign)"


def _extras() -> Iterator[tuple[str, str, str]]:
    for names, purpose, command in EXTRAS:
        versions = [f"{name} {_version(name)}" for name in names if _version(name)]
        if versions:
            yield OK, "extra", f"{purpose}: {', '.join(versions)}"
        else:
            yield NOTE, "extra", f"{purpose}: not installed ({command})"


def _devices() -> Iterator[tuple[str, str, str]]:
    try:
        import jax

        from jaxalign.parallel.startup import start

        start()
        devices = jax.devices()
    except Exception as error:  # a broken driver or plugin may raise anything
        yield BAD, "devices", f"jax finds none: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return
    kinds = sorted({d.device_kind for d in devices})
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield OK, "devices", f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()}){processes}"
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            used, limit = stats.get("bytes_in_use", 0), stats["bytes_limit"]
            yield OK, "memory", f"{device}: {_size(limit - used)} free of {_size(limit)} that jax may use"
    gpus = _nvidia()
    if gpus and jax.default_backend() == "cpu":
        yield BAD, "devices", f"{len(gpus)} x {gpus[0]} is there but jax runs on the CPU (pip install 'jaxalign[cuda]')"
    if jax.default_backend() == "cpu" and not gpus:
        yield NOTE, "devices", "no accelerator: small models and tests only"
    yield from _options(jax)
    yield from _works(jax)


def _options(jax) -> Iterator[tuple[str, str, str]]:
    """What programs are compiled with, and which part of a GPU they may use."""
    from jaxalign.parallel.compiler_options import compiler_options, pool_share

    given = ", ".join(f"{name}={value}" for name, value in compiler_options(update=True).items())
    yield OK, "XLA options", given or "the compiler's own"
    if jax.default_backend() == "gpu" and (share := pool_share()) < 0.9:
        yield (
            NOTE,
            "memory",
            f"jax takes {share:.0%} of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 in the environment gives it more",
        )


def _works(jax) -> Iterator[tuple[str, str, str]]:
    """A small model's gradient, compiled and run over all devices."""
    try:
        import jax.numpy as jnp
        import numpy as np

        from jaxalign.models.config import from_hf
        from jaxalign.models.transformer import Model
        from jaxalign.parallel.mesh import make_mesh
        from jaxalign.parallel.sharding import param_shardings, put_batch
        from jaxalign.types import CausalByIndex, Rows

        mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
        config = {
            "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        }  # fmt: skip
        model = Model(from_hf(config, dtype="float32", param_dtype="float32", remat="none"))
        index = np.tile(np.arange(32, dtype=np.int32), (len(mesh.devices.flat), 1))
        rows = Rows(index, index, np.zeros_like(index), index + 1, CausalByIndex())

        def loss(params, rows):
            return jnp.mean(jnp.square(model.apply(params, rows)[0]))

        start = time.perf_counter()
        with jax.set_mesh(mesh):
            abstract = model.abstract()
            params = jax.jit(model.init, out_shardings=param_shardings(mesh, abstract))(jax.random.key(0))
            value, gradient = jax.jit(jax.value_and_grad(loss))(params, put_batch(rows, mesh))
            finite = bool(jnp.isfinite(value)) and all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
        seconds = time.perf_counter() - start
    except Exception as error:  # any failure is the finding
        first = str(error).splitlines()[0][:300] if str(error) else ""
        yield BAD, "a step", f"failed: {type(error).__name__}: {first}"
        return
    text = f"a small model's gradient over {len(mesh.devices.flat)} device(s), compiled and run in {seconds:.1f} s"
    yield (OK if finite else BAD), "a step", text if finite else f"{text}: not finite"


def _nvidia() -> list[str]:
    """Names of the NVIDIA GPUs that the driver shows."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in out.stdout.splitlines() if line.strip()] if out.returncode == 0 else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(count: float) -> str:
    """Bytes in words.

    >>> _size(3 << 30)
    '3.0 GiB'
    """
    return f"{count / 2**30:.1f} GiB"

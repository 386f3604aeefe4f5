"""Fixtures of all tests.  Eight virtual CPU devices stand for a mesh; a plain array still lives on the first."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("NPROC", "64")  # see jaxalign.parallel.processes.initialize
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

_LONG = ("test_crashes", "test_two_processes", "test_toy_configs", "test_trainer")  # files of few, long tests

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("JAXALIGN_SHARED", ROOT.parent / "shared"))


def pytest_collection_modifyitems(items):
    """Long files first, so that two workers end together."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, tokenizers and data; tests that need it say so when it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no assets at {SHARED}: set JAXALIGN_SHARED to the folder that holds models/, tokenizers/, data/")
    return SHARED


@pytest.fixture
def x64():
    """64-bit arithmetic for one test."""
    with jax.enable_x64(True):
        yield

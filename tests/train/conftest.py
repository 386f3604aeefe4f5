"""Fixtures of the tests of training."""

import pytest


@pytest.fixture
def store():
    """An object store in memory, where `s3://` paths lead."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    old = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", MemoryFileSystem, clobber=True)
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem
    if old is not None:
        fsspec.register_implementation("s3", old, clobber=True)

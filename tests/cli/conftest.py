import sys
import types

import jax
import pytest

import jaxalign.train


@pytest.fixture
def one_device(monkeypatch):
    """Commands see one device: a program for eight virtual ones takes long to compile."""
    import jaxalign.pipeline.loaded as loaded

    make_mesh = loaded.make_mesh
    monkeypatch.setattr(loaded, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture
def trainer(monkeypatch):
    """The configurations that the trainer is given."""
    seen = []
    fake = types.ModuleType("jaxalign.train.trainer")
    fake.run = lambda checked, dry_run=False: seen.append((checked.config, dry_run)) or {}
    monkeypatch.setitem(sys.modules, "jaxalign.train.trainer", fake)
    monkeypatch.setattr(jaxalign.train, "trainer", fake, raising=False)
    return seen

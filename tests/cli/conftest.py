import jax
import pytest


@pytest.fixture
def one_device(monkeypatch):
    """Commands see one device: a program for eight virtual ones takes long to compile."""
    import jaxalign.pipeline.loaded as loaded

    make_mesh = loaded.make_mesh
    monkeypatch.setattr(loaded, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))

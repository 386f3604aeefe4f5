import jax
import pytest

import jaxalign.parallel.mesh
from jaxalign.pipeline import doctor as module


def test_doctor_finds_this_machine_in_order(capsys):
    assert module.doctor() == 0
    page = capsys.readouterr().out
    for word in ("python", "jax 0.", "flax 0.", "8 x cpu", "GiB free", "a small model's gradient over 8 device(s)"):
        assert word in page
    assert "everything that a run needs works here" in page


@pytest.fixture
def broken(monkeypatch):
    """Makes a function raise."""

    def make(module, name, error):
        def fail(*args, **keywords):
            raise error

        monkeypatch.setattr(module, name, fail)

    return make


def problems():
    """What is bad, by subject."""
    return {subject: text for status, subject, text in module.examine() if status == module.BAD}


def test_missing_packages_are_bad(monkeypatch, broken, capsys):
    monkeypatch.setattr(module, "CORE", ("jax", "a-package-nobody-has"))
    broken(jax, "devices", RuntimeError())
    assert module.doctor() == 1
    page = capsys.readouterr().out
    assert "BAD  packages" in page and "a-package-nobody-has" in page and "2 problems" in page


def test_a_gpu_that_jax_does_not_use_is_bad(monkeypatch, broken):
    monkeypatch.setattr(module, "_nvidia", lambda: ["NVIDIA H100"])
    broken(jaxalign.parallel.mesh, "make_mesh", ValueError())
    assert "jaxalign[cuda]" in problems()["devices"]


def test_no_device_at_all_is_told_not_raised(broken):
    broken(jax, "devices", RuntimeError("Unable to initialize backend 'tpu'\nmore"))
    found = problems()["devices"]
    assert "Unable to initialize backend 'tpu'" in found and "more" not in found


def test_a_step_that_fails_is_told_not_raised(broken):
    broken(jaxalign.parallel.mesh, "make_mesh", ValueError("no mesh today"))
    assert "no mesh today" in problems()["a step"]

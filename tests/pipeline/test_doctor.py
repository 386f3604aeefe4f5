from jaxalign.pipeline import doctor as module


def test_doctor_finds_this_machine_in_order(capsys):
    assert module.doctor() == 0
    page = capsys.readouterr().out
    for word in ("python", "jax 0.", "flax 0.", "8 x cpu", "GiB free", "a small model's gradient over 8 device(s)"):
        assert word in page
    assert "everything that a run needs works here" in page


def test_missing_packages_are_bad(monkeypatch, capsys):
    monkeypatch.setattr(module, "CORE", ("jax", "a-package-nobody-has"))
    monkeypatch.setattr(module, "_devices", lambda: iter(()))
    assert module.doctor() == 1
    page = capsys.readouterr().out
    assert "BAD  packages" in page and "a-package-nobody-has" in page and "1 problem\n" in page


def test_a_gpu_that_jax_does_not_use_is_bad(monkeypatch):
    monkeypatch.setattr(module, "_nvidia", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(module, "_works", lambda jax: iter(()))
    found = list(module._devices())
    assert any(status == module.BAD and "jaxalign[cuda]" in text for status, _, text in found)


def test_no_device_at_all_is_told_not_raised(monkeypatch):
    import jax

    def broken():
        raise RuntimeError("Unable to initialize backend 'tpu'\nmore")

    monkeypatch.setattr(jax, "devices", broken)
    assert list(module._devices()) == [(module.BAD, "devices", "jax finds none: Unable to initialize backend 'tpu'")]


def test_a_step_that_fails_is_told_not_raised(monkeypatch):
    import jax

    import jaxalign.parallel.mesh

    def broken(*args, **kwargs):
        raise ValueError("no mesh today")

    monkeypatch.setattr(jaxalign.parallel.mesh, "make_mesh", broken)
    assert list(module._works(jax)) == [(module.BAD, "a step", "failed: ValueError: no mesh today")]

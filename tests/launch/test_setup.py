"""launch/setup.sh with a fake pip: what it installs by what it sees, and that a second run does nothing."""

import sys

import pytest

# A fake .venv/bin/python: pip calls end with the recording, everything else goes to the real Python.
PYTHON = f"""
if call["args"][:2] == ["-m", "pip"]:
    sys.exit(int(os.environ.get("PIP_FAILS", "0")) if "install" in call["args"] else 0)
os.execv({sys.executable!r}, [{sys.executable!r}, *call["args"]])
"""


@pytest.fixture
def fresh(checkout):
    checkout.fake(checkout.root / ".venv" / "bin" / "python", PYTHON)
    return checkout


def installs(checkout) -> list[str]:
    """What pip was asked to install, call by call."""
    calls = [call for call in checkout.calls("python") if "install" in call["args"]]
    for call in calls:
        assert call["args"][call["args"].index("-c") + 1] == str(checkout.root / "launch/constraints.txt")
        assert call["cwd"] == str(checkout.root)
    return [call["args"][-1] for call in calls]


def test_a_second_run_does_nothing(fresh):
    for _ in range(2):
        result = fresh.run("launch/setup.sh")
        assert result.returncode == 0, result.stderr
    assert installs(fresh) == ["."]


def test_extras_are_kept(fresh):
    fresh.run("launch/setup.sh", "test")
    fresh.run("launch/setup.sh")
    fresh.run("launch/setup.sh", "wandb")
    fresh.run("launch/setup.sh", "test")
    assert installs(fresh) == [".[test]", ".[test,wandb]"]


def test_changed_pins_install_again(fresh):
    fresh.run("launch/setup.sh")
    with open(fresh.root / "launch/constraints.txt", "a") as file:
        file.write("# changed\n")
    fresh.run("launch/setup.sh")
    assert installs(fresh) == [".", "."]


def test_a_failed_installation_is_reported_and_tried_again(fresh):
    result = fresh.run("launch/setup.sh", PIP_FAILS="1")
    assert result.returncode == 2
    assert "pip could not install jaxalign" in result.stderr
    assert fresh.run("launch/setup.sh").returncode == 0
    assert installs(fresh) == [".", "."]


@pytest.mark.parametrize(
    ("cuda", "extra"), [("CUDA Version: 13.0", "cuda"), ("CUDA Version: 12.4", "cuda12"), ("", "cuda")]
)
def test_an_nvidia_gpu_is_seen(fresh, cuda, extra):
    fresh.fake("nvidia-smi", f"print('GPU 0: NVIDIA H200 (UUID: x)' if '-L' in call['args'] else '| {cuda} |')")
    assert fresh.run("launch/setup.sh").returncode == 0
    assert installs(fresh) == [f".[{extra}]"]


def test_nvidia_smi_without_a_gpu_is_a_cpu(fresh):
    fresh.fake("nvidia-smi", "print('No devices were found'); sys.exit(6)")
    assert fresh.run("launch/setup.sh").returncode == 0
    assert installs(fresh) == ["."]


@pytest.mark.parametrize(("device", "extra"), [("0x0062", ".[tpu]"), ("0x0042", ".")])
def test_a_tpu_is_told_by_its_pci_id(fresh, tmp_path, device, extra):
    card = tmp_path / "pci" / "0000:00:05.0"  # 0x0042 is Google's network card
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1ae0\n")
    (card / "device").write_text(f"{device}\n")
    assert fresh.run("launch/setup.sh", JAXALIGN_PCI=str(card.parent)).returncode == 0
    assert installs(fresh) == [extra]


def test_a_tpu_is_told_by_its_environment(fresh):
    assert fresh.run("launch/setup.sh", TPU_WORKER_HOSTNAMES="a,b").returncode == 0
    assert installs(fresh) == [".[tpu]"]


def test_the_choice_can_be_stated(fresh):
    fresh.fake("nvidia-smi", "print('GPU 0: NVIDIA H200 (UUID: x)')")
    assert fresh.run("launch/setup.sh", "test", JAXALIGN_ACCELERATOR="cpu").returncode == 0
    assert installs(fresh) == [".[test]"]
    result = fresh.run("launch/setup.sh", JAXALIGN_ACCELERATOR="npu")
    assert result.returncode == 2
    assert "found:    JAXALIGN_ACCELERATOR=npu" in result.stderr


def test_an_unknown_extra_is_refused(fresh):
    result = fresh.run("launch/setup.sh", "tset")
    assert result.returncode == 2
    assert "found:    extra 'tset'" in result.stderr
    assert "test" in result.stderr.split("expected:")[1]
    assert not installs(fresh)


def test_an_old_python_is_refused(checkout):
    checkout.fake("python2", "sys.exit(1)")
    result = checkout.run("launch/setup.sh", JAXALIGN_VENV=str(checkout.root / "new"), PYTHON="python2")
    assert result.returncode == 2
    assert "Python 3.11 or newer" in result.stderr


def test_a_virtual_environment_is_made(checkout):
    venv = checkout.root / "new"
    body = "import pathlib; p = pathlib.Path(call['args'][2]) / 'bin'; p.mkdir(parents=True); "
    body += f"(p / 'python').symlink_to({str(checkout.root / '.venv/bin/python')!r})\n"
    checkout.fake(checkout.root / ".venv" / "bin" / "python", PYTHON)
    checkout.fake(
        "python3.12",
        "if call['args'][0] == '-c': sys.exit(0)\n" + "if call['args'][0] == '-m': pass\nelse: sys.exit(0)\n" + body,
    )
    result = checkout.run("launch/setup.sh", JAXALIGN_VENV=str(venv), PYTHON="python3.12")
    assert result.returncode == 0, result.stderr
    assert [call["args"] for call in checkout.calls("python3.12")][-1] == ["-m", "venv", str(venv)]
    assert len(installs(checkout)) == 1


def test_a_dry_run_says_what_it_would_install_and_does_not(fresh):
    result = fresh.run("launch/setup.sh", "--dry_run", "test")
    assert result.returncode == 0, result.stderr
    assert "pip install" in result.stdout and "\\[test\\]" in result.stdout  # quoted for a shell
    assert not installs(fresh)
    fresh.run("launch/setup.sh", "test")
    assert "nothing to install" in fresh.run("launch/setup.sh", "--dry_run").stdout
    assert installs(fresh) == [".[test]"]


def test_a_check_fails_where_something_would_have_to_be_installed(fresh):
    """On a node without internet pip would try for minutes and fail; an environment made elsewhere is as good."""
    before = fresh.run("launch/setup.sh", "--check", JAXALIGN_ACCELERATOR="cuda")
    assert before.returncode == 2 and "JAXALIGN_ACCELERATOR=cuda bash launch/setup.sh" in before.stderr
    assert not installs(fresh)
    fresh.run("launch/setup.sh", JAXALIGN_ACCELERATOR="cuda")  # on the login node, which has no GPU
    fresh.fake("nvidia-smi", "print('GPU 0: NVIDIA H200 (UUID: x)')")
    assert fresh.run("launch/setup.sh", "--check").returncode == 0
    assert installs(fresh) == [".[cuda]"]


def test_a_check_without_an_environment(checkout):
    result = checkout.run("launch/setup.sh", "--check", JAXALIGN_VENV=str(checkout.root / "none"))
    assert result.returncode == 2 and "where there is internet" in result.stderr
    assert not (checkout.root / "none").exists()

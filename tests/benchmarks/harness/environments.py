"""The virtual environments of the peers, made from pins where they are missing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_CONSTRAINTS = ROOT / "launch" / "constraints.txt"

# The environments that hold what .venv holds and an extra of pyproject.toml beside it.
_EXTRAS = {".venv-oracle": "oracle", ".venv-oracle-ppo": "oracle-ppo"}
# Tunix asks for other versions than launch/constraints.txt has, so it gets an environment of its own.
_TUNIX = ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "safetensors<0.8")


def python_of(name: str) -> Path:
    """The Python of an environment, which is made, or mended, first.

    Args:
      name: of a folder at the top of the checkout; `.venv` stands for the Python that runs this.
    """
    if name == ".venv":
        return Path(sys.executable)
    wanted = _wanted(name)
    python = ROOT / name / "bin" / "python"
    if not _has(python, wanted):
        print(f"making {name}: {', '.join(wanted)}", flush=True)
        (_make_overlay if name in _EXTRAS else _make)(python, wanted)
        if not _has(python, wanted):
            raise SystemExit(
                f"found:    {name} without {', '.join(wanted)}\nexpected: those versions\nfix:      rm -r {name}"
            )
    return python


def _wanted(name: str) -> tuple[str, ...]:
    if name not in _EXTRAS:
        return _TUNIX
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tuple(tomllib.load(file)["project"]["optional-dependencies"][_EXTRAS[name]])


def _has(python: Path, wanted: tuple[str, ...]) -> bool:
    """Whether the exact versions among `wanted` are there."""
    if not python.exists():
        return False
    exact = [w.split("==") for w in wanted if "==" in w]
    script = (
        "import importlib.metadata as m, sys\n"
        f"for name, version in {exact!r}:\n"
        "    assert m.version(name).split('+')[0] == version, (name, m.version(name))\n"
    )
    return subprocess.run([python, "-c", script], stderr=subprocess.DEVNULL).returncode == 0


def _pip(python: Path, *args: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *args], check=True)


def _make(python: Path, wanted: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    _pip(python, *wanted)


def _make_overlay(python: Path, wanted: tuple[str, ...]) -> None:
    """As .ci/run makes it: torch first and alone, so that nothing after it can bring another build."""
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, base = (
        subprocess.run([p, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        for p in (python, sys.executable)
    )
    (Path(own) / "base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    _pip(python, "-c", str(_CONSTRAINTS), *(w for w in wanted if w.startswith("torch==")))
    _pip(python, "-c", str(_CONSTRAINTS), *wanted)

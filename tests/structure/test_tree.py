"""The tree: what lies at the top, how long files are, that each has its line in docs, and that no host is named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {
    "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff",
    "jaxalign", "configs", "docs", "launch", "tests", "notebooks",
}  # fmt: skip
LONGEST = 450  # lines


def tracked() -> list[str]:
    """The files of the checkout: those git tracks, and new ones that it does not ignore."""
    try:
        out = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return sorted(name for name in out.stdout.split("\0") if name and (ROOT / name).is_file())


def test_the_top_level():
    names = {name.split("/")[0] for name in tracked()}
    assert sorted(name for name in names - TOP if not name.startswith(".")) == []


def test_files_can_be_read_at_a_sitting():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked() if name.endswith((".py", ".sh"))}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_no_utils():
    stems = {name: Path(name).stem for name in tracked() if name.startswith("jaxalign/")}
    assert [name for name, stem in stems.items() if stem in {"utils", "util", "misc", "helpers", "common"}] == []


def test_no_registry_is_named():
    """Pins name packages and versions; where packages come from is the machine's own business."""
    registry = re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|--(extra-)?index-url|--find-links|"
        r"storage\.googleapis\.com/(jax|libtpu)|file:///",
        re.IGNORECASE,
    )
    this = Path(__file__).relative_to(ROOT).as_posix()
    found = []
    for name in tracked():
        if name == this or Path(name).suffix in {".npz", ".png", ".parquet", ".arrow", ".gz", ".safetensors", ".model"}:
            continue
        text = (ROOT / name).read_text(errors="replace")
        found += [
            f"{name}:{i}: {line.strip()[:100]}" for i, line in enumerate(text.splitlines(), 1) if registry.search(line)
        ]
    assert found == [], "\n" + "\n".join(found)


def test_pins_name_versions_only():
    line = re.compile(r'^[a-z0-9-]+==[0-9][A-Za-z0-9.]*( ; python_version (<|>=) "3\.\d+")?$')
    lines = [x for x in (ROOT / "launch/constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert [x for x in lines if not line.match(x)] == []
    plain = [x.split("==")[0] for x in lines if ";" not in x]
    assert len(plain) == len(set(plain))


def test_what_is_made_from_the_code_is_up_to_date():
    """The tree and every other part of docs/ between `<!-- made: ... -->` lines."""
    tracked()
    out = subprocess.run([sys.executable, "docs/make.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


def test_the_tree_has_a_line_with_words_for_every_file():
    page = (ROOT / "docs/architecture.md").read_text()
    lines = {line.split()[0]: line.split()[1:] for line in page.splitlines() if line.strip()}
    for name in tracked():
        path = Path(name)
        if not name.startswith((".", "tests/")) and path.name not in {"__init__.py", "__main__.py"}:
            assert lines.get(path.name), name


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and runs none of the second; the oracle tests run by themselves."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "oracle"]
    assert not [name for name in set(names) if names.count(name) > 1]

"""The tree: what lies at the top, how long files are, what README says of each, and that no host is named."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {"pyproject.toml", "README.md", "LICENSE", "jaxalign", "configs", "launch", "tests", "notebooks"}
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


def described(readme: str) -> set[str]:
    """The files that README's tree describes: an indented tree in a code block, a name and its purpose on each line."""
    found: set[str] = set()
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        stack: list[tuple[int, str]] = []
        for line in block.splitlines():
            match = re.match(r"^([\s│├└─|`-]*)([\w.*-][\w./*-]*)(\s+\S.*)?$", line)
            if not match:
                continue
            indent, name, words = len(match[1]), match[2], (match[3] or "").strip(" #-")
            while stack and stack[-1][0] >= indent:
                stack.pop()
            path = "".join(part for _, part in stack) + name
            if name.endswith("/"):
                stack.append((indent, name))
            if words:
                found.add(path)
    return found


def test_readme_has_a_line_for_every_file():
    """Folders of tests, golden values and configs may be described as a whole; the package's files one by one."""
    readme = ROOT / "README.md"
    names = described(readme.read_text()) if readme.exists() else set()
    whole = {name for name in names if name.endswith("/")}

    def covered(name: str) -> bool:
        if name in names or Path(name).name == "__init__.py" or name.split("/")[0].startswith("."):
            return True
        return name.startswith("tests/") and any(name.startswith(folder) and folder != "tests/" for folder in whole)

    missing = [name for name in tracked() if not covered(name)]
    assert missing == [], "README's tree has no line for:\n" + "\n".join(missing)
    gone = [name for name in names - whole if "/" in name and name.split("/")[0] in TOP and not (ROOT / name).exists()]
    assert gone == [], "README's tree describes files that are not there:\n" + "\n".join(gone)


def test_the_tree_reader():
    readme = "```\njaxalign/\n  ops/     array functions\n    kl.py    estimators\n    bare.py\nREADME.md  this\n```\n"
    assert described(readme) == {"jaxalign/ops/", "jaxalign/ops/kl.py", "README.md"}
    readme = "```text\njaxalign/\n├── ops/          # array functions\n│   └── kl.py   # KL\n└── cli.py  # flags\n```\n"
    assert described(readme) == {"jaxalign/ops/", "jaxalign/ops/kl.py", "jaxalign/cli.py"}

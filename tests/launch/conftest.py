"""A throw-away checkout with a space in its path, and fake commands that record how they were called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Arguments that any careless quoting breaks.
TRAIN = [
    "--config=configs/my dpo.py",
    '--config.model.path=it\'s $HOME `x` $(y) "z"',
    "--config.data.sources=a.jsonl,b;c",
]
KUBERNETES = ["--name=dpo", "--image=images/jaxalign:1"]
IN_IMAGE = ["--config=/jaxalign/configs/dpo.py", "--config.workdir=gs://bucket/run"]

# Each call appends one JSON line: the command's name, its arguments, the JAX settings it saw, its standard input.
RECORDER = """
import json, os, sys
settings = {{k: v for k, v in os.environ.items() if k.startswith(("JAX_", "JAXALIGN_", "CUDA_VISIBLE", "HF_", "XLA_"))}}
call = dict(name={name!r}, args=sys.argv[1:], env=settings, cwd=os.getcwd())
if call["args"][:1] == ["apply"]:
    call["stdin"] = sys.stdin.read()
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(call) + "\\n")
"""


# All that the scripts may find on the PATH beside the fakes: the machine's own kubectl or nvidia-smi stays out of it.
TOOLS = [
    *("bash", "cat", "cp", "dirname", "env", "git", "grep", "gzip", "head", "mkdir", "mktemp", "nohup", "rm", "sed"),
    *("seq", "sleep", "sort", "tail", "tar", "tr"),
]


def parts(result: subprocess.CompletedProcess) -> dict[str, str]:
    """The three parts of an error."""
    lines = [
        line.split(":", 1) for line in result.stderr.splitlines() if line.startswith(("found:", "expected:", "fix:"))
    ]
    return {key: value.strip() for key, value in lines}


class Checkout:
    """A copy of `launch/` whose outward calls are recorded."""

    def __init__(self, directory: Path):
        self.root = directory / "my checkout"
        self.bin = directory / "bin"
        self.record = directory / "calls.jsonl"
        self.bin.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.fake(self.root / ".venv" / "bin" / "jaxalign")
        self.fake(self.root / ".venv" / "bin" / "python")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.bin / "python3").symlink_to(sys.executable)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(directory),
            "RECORD": str(self.record),
            "PYTHON": sys.executable,
            "JAXALIGN_PCI": str(directory / "no-pci"),
        }

    def fake(self, name: str | Path, body: str = "") -> None:
        """Puts a recording command on the PATH, or at a path; `body` is Python that runs after the recording."""
        path = self.bin / name if isinstance(name, str) else name
        path.parent.mkdir(parents=True, exist_ok=True)
        program = self.bin.parent / f"fake-{len(list(self.bin.parent.glob('fake-*')))}.py"
        program.write_text(RECORDER.format(name=path.name) + body)
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
        path.chmod(0o755)

    def fake_setup(self) -> None:
        """Replaces launch/setup.sh by one that records the choice it was given."""
        (self.root / "launch" / "setup.sh").write_text(
            f"exec \"{sys.executable}\" -c \"import json, os, sys; open(os.environ['RECORD'], 'a').write(json.dumps("
            "dict(name='setup', args=sys.argv[1:], env={k: v for k, v in os.environ.items() if 'JAXALIGN_' in k},"
            'cwd=os.getcwd())) + chr(10))" "$@"\n'
        )

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        """Runs one of the launchers and returns what it printed."""
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            env=self.env | env,
            cwd=cwd or self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self, name: str | None = None) -> list[dict]:
        """The recorded calls in order, of one command or of all."""
        if not self.record.exists():
            return []
        found = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [call for call in found if name in (None, call["name"])]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    if os.name != "posix":
        pytest.skip("the launchers are bash scripts")
    return Checkout(tmp_path)

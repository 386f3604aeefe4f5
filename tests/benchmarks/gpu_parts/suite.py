"""The fast tests of what a step is made of, with the versions that are here; they run on the CPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from part import ROOT, SMOKE, emit, left, need

need("pytest")

FOLDERS = ("tests/ops/test_masked.py",) if SMOKE else ("tests/ops", "tests/steps", "tests/models", "tests/rollout")
WANTED = ("chex", "ml_collections", "datasets", "safetensors", "transformers", "xdist")


def main() -> None:
    there = [f for f in FOLDERS if (ROOT / f).exists()]
    missing = [m for m in WANTED if importlib.util.find_spec(m) is None]
    if missing:
        emit("tests that need these cannot run", note=", ".join(missing))
    options = ["-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "bare"]
    command = [sys.executable, "-m", "pytest", *options, *there]
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
        command += [f"--numprocesses={min(os.cpu_count() or 1, 2 if SMOKE else 12)}"]
    path = os.pathsep.join(p for p in (str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")) if p)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    environment.pop("XLA_FLAGS", None)  # the tests' own conftest sets them
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output = process.communicate(timeout=max(left() - 2, 5))[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    for line in re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)[:20]:
        emit("failed", note=line[:160])
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output)}
    note = ", ".join(f"{n} {word}" for word, n in found.items())
    bad = sum(n for word, n in found.items() if word in ("failed", "error", "errors"))
    more = {"ok": not bad} if found or SMOKE else {}
    last = output.strip()[-120:].replace("\n", " ")
    case = f"tests: {', '.join(FOLDERS)}"
    emit(case, found.get("passed"), "passed" if found else "", note=note or f"stopped at: {last}", **more)


if __name__ == "__main__":
    main()

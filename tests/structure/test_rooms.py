"""Each module imports only from rooms with a smaller number, and rooms of one number never import each other."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jaxalign"

# Room 0 is the package itself, which holds the version alone.
ROOMS = {
    "errors": 1, "functions": 1, "disk": 1, "pair_losses": 1, "registry": 1, "ranges": 1, "relations": 1, "types": 1,
    "config": 1,
    "ops": 2, "data": 2, "parallel": 2,
    "models": 3,
    "rollout": 4,
    "rewards": 5,
    "steps": 6, "evaluate": 6,
    "train": 7,
    "pipeline": 8,
    "plan": 9, "library": 9, "examples": 9,
    "commands": 10, "cli": 11, "__main__": 12,
}  # fmt: skip

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file belongs to; "" for the package's own __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of a file, inside functions too; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; rooms are read off absolute names"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def outside(path: Path) -> set[str]:
    """Names of the top-level packages a file imports."""
    return {module.split(".")[0] for _, module in imports(path)}


def test_every_file_has_a_room():
    assert sorted({room_of(path) for path in MODULES} - {""} - set(ROOMS)) == []


def test_rooms_import_from_smaller_numbers_only():
    wrong = []
    for path in MODULES:
        here = room_of(path)
        if not here:  # the library's face: see below
            continue
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] != "jaxalign" or parts[1] == "__version__":
                continue
            there = parts[1]
            same_file_room = there == here and path.parent != PACKAGE
            # Room 1 is one room of files: each may use those before it.
            first = ("errors", "functions", "disk", "pair_losses", "registry", "ranges", "relations", "types", "config")
            one = here in first and there in first and first.index(there) < first.index(here)
            if not (same_file_room or one or (here and ROOMS[there] < ROOMS[here])):
                where = f"{path.relative_to(ROOT)}:{line}: {here or 'jaxalign'} ({ROOMS.get(here, 0)})"
                wrong.append(f"{where} imports {module} ({ROOMS[there]})")
    assert wrong == [], "\n" + "\n".join(wrong)


def test_no_two_files_import_each_other():
    """Not for types either: what both need is a file of its own."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    uses = {
        name: {module if module in names else module.rpartition(".")[0] for _, module in imports(path)} & names.keys()
        for name, path in names.items()
    }
    assert sorted((a, b) for a in uses for b in uses[a] if a < b and a in uses[b]) == []


def test_the_package_itself_imports_what_is_asked_for_and_nothing_before():
    """At the top level `typing` alone; the names for type checkers are those that are imported late."""
    import jaxalign

    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    early = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {node.module for node in early} == {"__future__", "typing"}
    typed = {
        alias.asname: node.module.removeprefix("jaxalign.")
        for block in body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }
    assert typed == jaxalign._FACE | {"train": "library"}


def test_nothing_imports_torch_or_a_peer():
    """torch, trl and peft are test oracles; transformers gives tokenizers, templates and configurations only."""
    banned = {"torch", "trl", "peft", "accelerate", "tensorflow"}
    assert [str(path) for path in MODULES if outside(path) & banned] == []


@pytest.mark.parametrize(
    "room", ["data", "config", "types", "errors", "disk", "pair_losses", "registry", "ranges", "relations"]
)
def test_rooms_without_jax(room):
    """Data are numpy, and a configuration is checked before jax is loaded."""
    heavy = {"jax", "flax", "optax", "chex", "orbax"}
    assert [str(path) for path in MODULES if room_of(path) == room and outside(path) & heavy] == []


def test_steps_know_no_model():
    """Steps get `apply` as an argument; only the types of other rooms' results come in."""
    for path in MODULES:
        if room_of(path) in ("ops", "steps"):
            assert not any(module.startswith("jaxalign.models") for _, module in imports(path)), path


def cpu_seconds_of_children() -> float:
    """Of processes that have ended; unlike time on the wall it does not grow with what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loaded_by(code: str) -> tuple[float, set[str]]:
    """CPU seconds a fresh Python takes for `code`, the best of three, and the top-level packages it has loaded then."""
    program = f"{code}\nimport sys; print('\\n' + ' '.join(m for m in sys.modules if '.' not in m))"
    seconds = []
    for _ in range(3):
        start = cpu_seconds_of_children()
        out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(cpu_seconds_of_children() - start)
    return min(seconds), set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import jaxalign",
        "import jaxalign.config",
        "import sys; sys.argv = ['jaxalign', '--help']; from jaxalign.cli import main; main()",
    ],
)
def test_import_and_help_are_quick(code):
    seconds, modules = loaded_by(code)
    assert modules & {"jax", "flax", "transformers", "datasets", "optax", "orbax", "matplotlib"} == set()
    assert seconds < 1

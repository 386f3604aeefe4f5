"""pyproject.toml declares what the package imports; what is an extra is imported only where it is used."""

import ast
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.structure.test_rooms import MODULES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
# Extras that people add to use the package; the others are for tests and for compiling ahead.
EXTRAS = {
    canonical: name
    for name in ("cuda", "cuda12", "tpu", "gcs", "wandb", "mlflow", "plots")
    for line in PROJECT["optional-dependencies"].get(name, [])
    for canonical in [Requirement(line).name.lower().replace("_", "-")]
}
# Distributions whose import has another name.
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "pyyaml"}


def outside(path) -> list[tuple[int, str, bool]]:
    """(line, distribution, whether inside a function) of every import that is neither the package's nor Python's."""
    found = []

    def walk(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [child.module]
            for name in (name.split(".")[0] for name in names):
                if name != "jaxalign" and name not in sys.stdlib_module_names:
                    found.append((child.lineno, DISTRIBUTIONS.get(name, name.lower().replace("_", "-")), late))
            walk(child, late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(), str(path)), False)
    return found


def test_every_import_is_declared():
    """What comes in with another package today may stay away tomorrow."""
    declared = {requirement.name.lower().replace("_", "-") for requirement in CORE} | set(EXTRAS)
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in MODULES
        for line, name, _ in outside(path)
        if name not in declared
    ]
    assert missing == [], "\n" + "\n".join(missing)


def test_extras_are_imported_late():
    core = {requirement.name.lower().replace("_", "-") for requirement in CORE}
    early = [
        f"{path.relative_to(ROOT)}:{line}: {name} is in the extra {EXTRAS[name]}"
        for path in MODULES
        for line, name, late in outside(path)
        if name in EXTRAS and name not in core and not late
    ]
    assert early == []


def test_training_needs_no_drawing():
    assert "matplotlib" not in {requirement.name for requirement in CORE}
    assert EXTRAS["matplotlib"] == "plots"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.14"])
def test_jax_and_flax_are_bounded_on_both_sides(python):
    """They go in pairs, so a newer one of either may come only once it has been tried; the pins lie inside."""
    pins = {}
    for line in (ROOT / "launch/constraints.txt").read_text().splitlines():
        if line.startswith(("jax==", "flax==")):
            requirement = Requirement(line)
            if requirement.marker.evaluate({"python_version": python}):
                pins[requirement.name] = re.sub("==", "", str(requirement.specifier))
    for name in ("jax", "flax"):
        bounds = SpecifierSet()
        for requirement in CORE:
            if requirement.name == name and (
                requirement.marker is None or requirement.marker.evaluate({"python_version": python})
            ):
                bounds &= requirement.specifier
        assert {bound.operator for bound in bounds} == {">=", "<"}, f"{name} on Python {python}: {bounds}"
        assert pins[name] in bounds

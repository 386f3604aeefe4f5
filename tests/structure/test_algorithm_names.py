"""Nothing compares an algorithm's name: what differs between algorithms is said by their entries and builders."""

import ast
from pathlib import Path

import pytest

from jaxalign.data.forms import FORMS
from jaxalign.registry import ALGORITHMS
from jaxalign.train import algorithms

PACKAGE = Path(__file__).resolve().parents[2] / "jaxalign"
NAMES = set(ALGORITHMS)
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "examples"]
TABLES = ("registry.py", "train/algorithms.py")  # entries, builders


def names_in(node: ast.expr | None) -> set[str]:
    """The algorithms' names that a literal, or a tuple of literals, holds."""
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
    return {part.value for part in parts if isinstance(part, ast.Constant) and part.value in NAMES}


def of_a_flag(node: ast.Compare) -> bool:
    """`--reward` is a flag too."""
    return isinstance(node.left, ast.Name) and node.left.id == "flag"


def branches(source: str) -> list[str]:
    """Lines of comparisons with algorithms' names, and of tables that several of them are keys of."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and not of_a_flag(node):
            if any(names_in(side) for side in (node.left, *node.comparators)):
                found.append(f"line {node.lineno}: a comparison")
        elif isinstance(node, ast.MatchValue) and names_in(node.value):
            found.append(f"line {node.lineno}: a case")
        elif isinstance(node, ast.Dict) and len(set().union(*map(names_in, node.keys))) > 1:
            found.append(f"line {node.lineno}: a table")
    return found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("c.algorithm.name == 'ppo'", 1),
        ("purpose in ('reward', 'dpo') or x != 'sft'", 2),
        ("{'sft': 1, 'dpo': 2}", 1),
        ("{('sft', 'x'): 1, ('ppo', 'y'): 2}", 1),
        ("record.form == 'pair' or result['reward'] is None or flag == 'reward'", 0),
        ("{'policy': 1, 'reward': 2}", 0),
    ],
)
def test_what_counts_as_a_branch(source, count):
    assert len(branches(source)) == count


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_branches_on_an_algorithm(path):
    found = branches(path.read_text())
    if path.relative_to(PACKAGE).as_posix() in TABLES:
        found = [line for line in found if "table" not in line]
    assert found == []


def test_every_entry_has_a_builder_and_reads_forms_that_are_known():
    assert set(algorithms.BUILDERS) == NAMES
    for name, entry in ALGORITHMS.items():
        assert entry.fields()["algorithm"]["name"] == name
        assert set(entry.reads.forms) <= set(FORMS)
        assert len({len(FORMS[form].completions) for form in entry.reads.forms}) == 1, "one number of slots"


def test_forms_are_made_of_forms():
    for form in FORMS.values():
        assert set(form.made_of) <= set(FORMS)


def test_fields_of_one_name_have_one_bound():
    fields = [bound for entry in ALGORITHMS.values() for bound in {row[0]: row for row in entry.bounds}.values()]
    assert len({row[0] for row in fields}) == len(set(fields))

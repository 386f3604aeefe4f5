"""A family of models is one file and one line of a table; no other code knows its name."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ROOT / "jaxalign/models/families"
# Files that hold the config.json of a small model, as data: the quickstart's, and the doctor's.
EXAMPLES = {"assets.py", "doctor.py"}


def _names(path: Path) -> list[tuple[int, str]]:
    """(line, word) of every name and string of a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module", "value"):
            value = getattr(node, field, None)
            if isinstance(value, str) and id(node) not in docs:
                found.append((getattr(node, "lineno", 0), value))
    return found


def test_no_other_file_names_a_family():
    stems = [path.stem for path in FAMILIES.glob("*.py") if path.stem != "__init__"]
    assert stems
    # A rope type such as "llama3" is a name of config.json that several families share.
    family = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, stems))})(?!\d)", re.IGNORECASE)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text[:80]}"
        for path in sorted((ROOT / "jaxalign").rglob("*.py"))
        if FAMILIES not in path.parents and path.name not in EXAMPLES
        for line, text in _names(path)
        if family.search(text)
    ]
    assert wrong == [], "\n" + "\n".join(wrong)


def test_a_family_is_one_line_of_the_table():
    table = (FAMILIES / "__init__.py").read_text()
    for path in FAMILIES.glob("*.py"):
        if path.stem != "__init__":
            assert table.count(f"    {path.stem}.FAMILY,\n") == 1

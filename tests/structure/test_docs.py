"""The pages of docs/ know every warning, and their code runs."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import jaxalign
from jaxalign.pipeline.aliases import ALIASES
from jaxalign.train import health
from jaxalign.train.named_functions import own_loss

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
LINES = [set(re.findall(r"[a-z_]{3,}", line.lower())) for line in PAGE.splitlines()]


def literals(node: ast.AST) -> str:
    """The fixed words of a text, the values that it is filled with left out."""
    return " ".join(c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))


def warnings() -> list[str]:
    """What the package may print as a warning: the fixed words of each."""
    found = []
    for path in sorted((ROOT / "jaxalign").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "_warnings":
                appends = (n for n in ast.walk(node) if isinstance(n, ast.Call) and "append" in ast.unparse(n.func))
                found += [literals(call.args[0]) for call in appends]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "print") and node.args:
                text = literals(node.args[0])
                if text.startswith("warning: ") and len(text.split()) > 4:
                    found.append(text.removeprefix("warning: "))
    return found


def test_warnings_are_found():
    assert len(warnings()) > 20


@pytest.mark.parametrize("text", warnings(), ids=lambda text: text[:40])
def test_troubleshooting_has_every_warning(text):
    """Most words of the warning's beginning stand together in a line of the page."""
    words = re.findall(r"[a-z_]{3,}", re.split(r"[:;](?= |$)", text)[0].lower() or text.lower())
    words = set(words) or set(re.findall(r"[a-z_]{3,}", text.lower()))
    best = max(len(words & line) for line in LINES)
    assert best >= 0.6 * len(words), (text, best, len(words))


def test_troubleshooting_has_every_sign_of_health():
    for sign, _, text in health._LIMITS:
        assert f"`{sign}`" in PAGE, (sign, text)
    for sign in re.findall(r"`((?:samples|objective)/\w+)`", health.__doc__):
        assert f"`{sign}`" in PAGE, sign


RUN = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)
RUNNABLE = {path.name: blocks for path in sorted(ROOT.glob("docs/*.md")) if (blocks := RUN.findall(path.read_text()))}


@pytest.mark.parametrize("page", RUNNABLE)
def test_code_in_pages_runs(page, tmp_path, monkeypatch):
    """The blocks of a page that are marked `<!-- run -->`, in order, as one program."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page}
    assert any("assert " in block for block in RUNNABLE[page]), "code that shows nothing"
    for block in RUNNABLE[page]:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_all_code_in_pages_is_python(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == page.read_text().count("```python\n"), "a block that is not closed"
    for block in blocks:
        ast.parse(block)


def test_the_table_of_trl_agrees_with_the_names_that_are_translated():
    page = (ROOT / "docs/coming_from.md").read_text()
    table = page.split("<!-- trl -->")[1].split("<!-- end trl -->")[0]
    rows = [[re.findall(r"`([\w.]+)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines()[3:]]
    assert len(rows) > 40
    for theirs, ours in rows:
        for name in theirs:
            known = ALIASES.get(name, ())
            assert ours[0] in known or (not known and ours[0].endswith(name.rpartition("_")[2])), (name, ours, known)


def test_modules_and_names_that_pages_speak_of_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        for name in set(re.findall(r"`(jaxalign(?:\.\w+)+)`", page.read_text())):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), (page.name, name)


def test_the_page_of_the_library_has_every_name_that_it_offers():
    page = (ROOT / "docs/library.md").read_text()
    assert [name for name in jaxalign.__all__ if f"`{name}`" not in page] == []


def test_the_loss_of_a_users_own_is_taken_by_name(tmp_path, monkeypatch):
    block = next(block for block in RUNNABLE["extending.md"] if block.startswith("# own.py"))
    (tmp_path / "own.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    assert own_loss("own.py:hinge_loss").__name__ == "hinge_loss"

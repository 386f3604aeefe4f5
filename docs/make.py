"""Writes the parts of docs/ that are made from the code; with --check only says which of them are out of date.

    python docs/make.py            after adding, renaming or removing a file
    python docs/make.py --check    what tests/structure runs

A part stands in its page between the lines `<!-- made: NAME -->` and `<!-- end: NAME -->`, NAME a function of `PARTS`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(DOCS)]  # this checkout, wherever the script is run from

# What a file that is no Python module is for; a module says it in its docstring.
_PURPOSES = {
    "pyproject.toml": "package, extras, tools",
    "README.md": "one page: what it is, the main job, your own pairs, what is supported, launching",
    "LICENSE": "Apache 2.0",
    "CHANGELOG.md": "what changed, version by version",
    "CONTRIBUTING.md": "set-up, tests, phases of .ci/run, rules",
    "CITATION.cff": "how to cite jaxalign",
    "launch/Dockerfile": "the image that kubernetes.sh runs",
    "launch/constraints.txt": "the pinned versions, for each Python",
    "launch/say.sh": "found, expected, fix, and what a dry run would do: the launchers' words",
    "launch/kubernetes.yaml": "the JobSet that kubernetes.py fills in",
    "notebooks/dpo_vs_rlhf.ipynb": "the two roads side by side, from the quickstart's results",
}
# What a folder that is no package is for.
_FOLDERS = {
    "configs": "runnable lab notes",
    "configs/toy": "the same at toy size, for tests",
    "docs": "pages that the README links",
    "launch": "set-up and launchers",
    "notebooks": "",
    "tests": "",
    "tests/absent": "ahead-of-time compilation for TPU and GPU topologies",
    "tests/benchmarks": "jaxalign and its peers in turns: tokens/s, ratios, memory; run one file, --help says how",
    "tests/cli": "commands",
    "tests/config": "defaults, mistakes and warnings of the configuration",
    "tests/configs": "every config; the toy ones run",
    "tests/data": "files, columns, presets, mixtures, tokens, limits, rows, packing, report",
    "tests/evaluate": "win rates, perplexity",
    "tests/examples": "the world of the quickstart, the data of the stories",
    "tests/fuzz": "bad inputs and faults, each to be told in words; all of them: python -m tests.fuzz",
    "tests/golden": "values of the live oracles",
    "tests/library": "what import jaxalign offers",
    "tests/launch": "launchers against fake gcloud, srun, scontrol, kubectl",
    "tests/models": "transformer, Hugging Face in and out",
    "tests/ops": "losses and readouts against hand numbers and loops",
    "tests/oracle": "against torch, transformers and TRL, live",
    "tests/parallel": "mesh, shardings, start-up",
    "tests/pipeline": "stages, export",
    "tests/plan": "memory planning",
    "tests/rewards": "functions and models as rewards",
    "tests/rollout": "sampling, decoding",
    "tests/steps": "invariances, closed form, step 0",
    "tests/structure": "rooms, the tree, configs",
    "tests/train": "loop, collection of experience, crashes, processes, checkpoints",
}


# In this order the page of the configuration has them; others follow.
_SECTIONS = ("", "from", "model", "data", "algorithm", "rollout", "rewards", "optimizer", "mesh", "eval", "checkpoint")


def tracked() -> list[str]:
    """The files of the checkout: those git tracks, and new ones that it does not ignore."""
    out = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(name for name in out.stdout.split("\0") if name and (ROOT / name).is_file())


def first_sentence(path: Path) -> str:
    """What a file says of itself: the first paragraph of its docstring, of its leading comment, or its title."""
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
    elif path.suffix == ".md":
        return path.read_text().split("\n", 1)[0].lstrip("# ")
    else:
        lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
        said = lines[0] if lines else ""
    said = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=\w\w)\. ", said)[0].rstrip(".:")


def rooms() -> dict[str, int]:
    """The rooms' numbers, from the test that holds them."""
    tree = ast.parse((ROOT / "tests/structure/test_rooms.py").read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS"
    )


def tree() -> str:
    """Every file with its purpose; of tests the folders."""
    numbers, seen, lines = rooms(), set(), []
    names = [name for name in tracked() if not name.startswith(".")]
    # The package room by room, then all else; files of a folder before its folders.
    top = sorted({name.split("/")[0] for name in names}, key=lambda n: (n != "jaxalign", "." in n, n))

    def line(depth: int, name: str, words: str) -> None:
        lines.append(f"{'  ' * depth + name:<34}{words}".rstrip())

    def folder(path: str, depth: int) -> None:
        package = ROOT / path / "__init__.py"
        words = _FOLDERS[path] if path in _FOLDERS else first_sentence(package)
        number = numbers.get(path.split("/")[-1]) if path.count("/") == 1 and path.startswith("jaxalign/") else None
        line(depth, path.split("/")[-1] + "/", words if number is None else f"{number}: {words}")
        inside = sorted({name[len(path) + 1 :].split("/")[0] for name in names if name.startswith(path + "/")})
        if path.startswith("jaxalign"):
            inside.sort(key=lambda n: (numbers.get(n.removesuffix(".py"), 0) if path == "jaxalign" else 0, n))
        for name in inside:
            there = f"{path}/{name}"
            if (ROOT / there).is_dir():
                if not path.startswith("tests/"):
                    folder(there, depth + 1)
            elif name != "__init__.py" and not path.startswith("tests/"):
                file(there, depth + 1)

    def file(path: str, depth: int) -> None:
        words = _PURPOSES.get(path) or first_sentence(ROOT / path)
        number = numbers.get(Path(path).stem) if path.startswith("jaxalign/") and path.count("/") == 1 else None
        line(depth, path.split("/")[-1], words if number is None else f"{number}: {words}")

    for name in top:
        if name in seen:
            continue
        seen.add(name)
        folder(name, 0) if (ROOT / name).is_dir() else file(name, 0)
    return "```text\n" + "\n".join(lines) + "\n```"


def columns() -> str:
    """Our names of columns."""
    from jaxalign.data.columns import FIELDS

    return "\n".join(
        ["| column | what it is |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in FIELDS.items())]
    )


def presets() -> str:
    """Published sets and what tells them."""
    from jaxalign.data.presets import PRESETS

    lines = ["| preset | hub ids | or any source with the columns |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        schemas = "; or ".join(", ".join(f"`{column}`" for column in schema) for schema in preset.signatures)
        lines.append(f"| `{name}` | {', '.join(f'`{hub}`' for hub in preset.hub_ids)} | {schemas} |")
    return "\n".join(lines)


def fields() -> str:
    """Every field of a configuration, a table for each section."""
    from jaxalign.pipeline.fields import fields as of
    from jaxalign.ranges import BOUNDS, CHOICES, FUNCTIONS, REQUIRED
    from jaxalign.registry import ALGORITHMS

    known = {name: {f.name: f for f in of(name)} for name in ALGORITHMS}
    sections: dict[str, list[str]] = {section: [] for section in _SECTIONS}
    for name in dict.fromkeys(name for by_name in known.values() for name in by_name):
        sections.setdefault(name.rpartition(".")[0], []).append(name)

    def default(name: str) -> str:
        if name in REQUIRED:
            return "required"
        values: dict[str, list[str]] = {}
        for algorithm, by_name in known.items():
            if name in by_name:
                value = by_name[name].default
                values.setdefault("none" if value in (None, ()) else f"`{value}`", []).append(algorithm)
        if len(values) == 1:
            return next(iter(values))
        return "; ".join(f"{', '.join(names)} {value}" for value, names in values.items())

    def may_be(name: str) -> str:
        parts = [", ".join("none" if c is None else f"`{c}`" for c in of) for field, of in CHOICES if field == name]
        parts += ["or `FILE.py:FUNCTION`"] * (name in FUNCTIONS)
        parts += [f"{_number(low)} to {_number(high)}" for field, low, high in BOUNDS if field == name]
        guides: dict[str, list[str]] = {}
        for algorithm, entry in ALGORITHMS.items():
            for field, low, high in entry.guides:
                if field == name:
                    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
                    guides.setdefault(text, []).append(algorithm)
        return "; ".join(parts + [f"guides ({', '.join(names)}): {text}" for text, names in guides.items()])

    lines = []
    for section, names in sections.items():
        lines += [f"### {section or 'The run'}", "", "| field | default | may be | what it is |", "|---|---|---|---|"]
        for name in names:
            having = [algorithm for algorithm, by_name in known.items() if name in by_name]
            only = "" if len(having) == len(known) else f"{', '.join(having)}: "
            sentence = next((known[a][name].sentence for a in having if known[a][name].sentence), "").replace(
                "|", "\\|"
            )
            lines.append(f"| `{name}` | {default(name)} | {may_be(name)} | {only}{sentence} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def aliases() -> str:
    """What other programs call our fields."""
    from jaxalign.pipeline.aliases import ALIASES

    by_field: dict[str, list[str]] = {}
    for alias, names in ALIASES.items():
        by_field.setdefault(" or ".join(f"`{name}`" for name in names), []).append(f"`{alias}`")
    lines = ["| here | elsewhere |", "|---|---|"]
    return "\n".join([*lines, *(f"| {field} | {', '.join(found)} |" for field, found in by_field.items())])


def errors() -> str:
    """Every error that input can cause, file by file: what was found, and the line that fixes it."""
    lines = []
    for path in sorted((ROOT / "jaxalign").rglob("*.py")):
        tree = ast.parse(path.read_text())
        rows = []
        for node in ast.walk(tree):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in ("InputError", "BadRow") and len(node.args) > 2:
                found, fix = _words(node.args[0]), _words(node.args[2])
                if len(found.replace("…", "").split()) > 1:
                    rows.append(f"| {found} | {fix} |")
        if rows:
            lines += [f"### {path.relative_to(ROOT)}", "", "| found | fix |", "|---|---|", *dict.fromkeys(rows), ""]
    return "\n".join(lines).rstrip()


def _words(node: ast.expr) -> str:
    """A text in the code with … for what it is filled with."""
    if isinstance(node, ast.Constant):
        text = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    elif isinstance(node, ast.BinOp):
        text = _words(node.left) + (_words(node.right) if isinstance(node.op, ast.Add) else "")
    else:
        text = "…"
    text = re.sub(r"(… ?)+…", "…", " ".join(text.split()))
    return re.sub(r"([|<>*_`])", r"\\\1", text)


def families() -> str:
    """The families of models that load."""
    from jaxalign.models.families import FAMILIES

    lines = ["| family | `model_type` | architectures |", "|---|---|---|"]
    for family in FAMILIES:
        kinds = ", ".join(f"`{kind}`" for kind in family.model_types)
        kinds += "".join(f"; the text part of `{kind}`" for kind in family.inside)
        named = (f"`{a}`{' (here alone)' * (head in family.only_here)}" for head, a in family.architectures.items())
        lines.append(f"| {family.name} | {kinds} | {', '.join(named)} |")
    return "\n".join(lines)


def losses() -> str:
    """Preference losses and estimators by the names that fields give them."""
    from jaxalign.ops.advantages import ESTIMATORS
    from jaxalign.ops.losses_preference import PREFERENCE_LOSSES

    lines = ["| name | what it is | function |", "|---|---|---|"]
    for name, function in [*PREFERENCE_LOSSES.items(), *ESTIMATORS.items()]:
        said = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        lines.append(f"| `{name}` | {said} | `{function.__module__}.{function.__name__}` |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "errors": errors,
    "families": families,
    "losses": losses,
    "tree": tree,
    "columns": columns,
    "presets": presets,
    "fields": fields,
    "aliases": aliases,
}


def remade(page: str) -> str:
    """A page with its parts made anew."""

    def part(match: re.Match) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- made: (\w+) -->)\n.*?(<!-- end: \2 -->)", part, page, flags=re.DOTALL)


def main(check: bool) -> int:
    """Writes, or with `check` compares; returns the number of pages that are out of date."""
    stale = 0
    for path in sorted(DOCS.glob("*.md")):
        old = path.read_text()
        new = remade(old)
        if new != old:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date: python docs/make.py' if check else 'written'}")
            if not check:
                path.write_text(new)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))

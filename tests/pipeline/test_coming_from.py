"""The page for those who come from elsewhere: names that the other programs have, each translated where it is given."""

import json
import re
from pathlib import Path

import pytest

from jaxalign.config import ALGORITHMS, defaults, leaves
from jaxalign.pipeline.mistakes import nearest_field

ROOT = Path(__file__).resolve().parents[2]
# What the programs of these versions have: read off axolotl's schemas, OpenRLHF's flags, Tunix's dataclasses.
NAMES = {version: set(names.split()) for version, names in json.loads(
    (ROOT / "tests/golden/peer_fields.json").read_text()
).items()}  # fmt: skip
FIELDS = {field: name for name in ALGORITHMS for field in leaves(defaults(name))}


def rows(program):
    """The names of each cell of a program's table; for Tunix with their class."""
    page = (ROOT / "docs/coming_from.md").read_text().partition(f"\n## {program}\n")[2].partition("\n## ")[0]
    for line in page.splitlines():
        if line.startswith("| ") and "`" in line:
            yield [re.findall(r"`(?:--)?([\w./]+)(?:=\w+|: \w+)?`", cell) for cell in line.split("|")[1:-1]]


def tunix():
    """(names with their class, fields) of the rows that speak of fields."""
    for theirs, ours, *_ in rows("Tunix"):
        if theirs and theirs[0].partition(".")[0].endswith(("Config", "Options")) and "." in theirs[0]:
            owner = theirs[0].partition(".")[0]
            yield [name if "." in name else f"{owner}.{name}" for name in theirs], ours


def test_the_names_are_there():
    axolotl, new, old = (
        {x for row in rows(program) for x in row[at]}
        for program, at in (("axolotl", 0), ("OpenRLHF", 0), ("OpenRLHF", 2))
    )
    assert len(axolotl) > 25 and len(new) > 50 and len(old) > 50
    assert {x for x in axolotl if not {x, f"datasets.{x}"} & NAMES["axolotl 0.19.0"]} == set()
    assert new - NAMES["OpenRLHF 0.11.2"] == set()
    assert old - NAMES["OpenRLHF 0.9.10"] == set()
    assert {x for theirs, _ in tunix() for x in theirs} - NAMES["Tunix 0.1.7"] == set()


# Names of a section or of another field here, which say so themselves.
AMBIGUOUS = ("optimizer", "path", "type", "PPOConfig.beta")


def pairs():
    for program in ("axolotl", "OpenRLHF"):
        for row in rows(program):
            for theirs in row[::2] if program == "OpenRLHF" else row[:1]:
                yield theirs, row[1]
    yield from tunix()


TRANSLATED = sorted(
    {
        (name, field)
        for theirs, ours in pairs()
        for name, field in zip(theirs, ours * len(theirs) if len(ours) == 1 else ours, strict=False)
        if len(ours) in (1, len(theirs)) and field in FIELDS and name not in AMBIGUOUS
    }
)


@pytest.mark.parametrize("name,field", TRANSLATED)
def test_each_is_translated(name, field):
    name = re.sub(r"^[A-Z]\w+\.", "", name)  # without Tunix's class
    if name != field:
        assert nearest_field(defaults(FIELDS[field]), name) == field

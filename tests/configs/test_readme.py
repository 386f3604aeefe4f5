"""README's configs load and fit their commands, and the fields that it names are there with these defaults."""

import re
from pathlib import Path

import pytest

from jaxalign.config import ALGORITHMS, defaults, get, leaves
from jaxalign.pipeline import stages
from jaxalign.pipeline.configfile import load_config
from jaxalign.rewards.function import load_function

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", README, re.DOTALL))
CONFIGS = sorted(name for name in FILES if name.startswith("configs/"))


@pytest.fixture
def written(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_whole(written, name):
    """Nothing is left to fill in but the files they name."""
    config = load_config(name)
    found = stages.plan(config)
    assert found and all(not stage.warnings for stage in found)
    if function := get(config, "rewards.function"):
        assert load_function(function)([], ["please", "no"], records=[], completion_ids=[], finished=[], step=0) == [
            1,
            0,
        ]


def test_there_are_configs_of_every_kind():
    assert {"configs/mine.py", "configs/road.py", "configs/polite.py"} <= set(CONFIGS)


def test_overrides_in_commands_name_fields(written):
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [c for block in blocks for c in block.replace("\\\n", " ").splitlines() if "--config=" in c]
    checked = 0
    for command in commands:
        name = re.search(r"--config=(\S+)", command)[1]
        if name in FILES:
            fields = set(leaves(load_config(name)))
            for field in re.findall(r"--config\.([\w.]+)=", command):
                assert field in fields, field
                checked += 1
    assert checked >= 3


def test_the_table_of_fields():
    rows = README.split("| field | default | what it is |")[1].split("\n\n")[0].splitlines()[2:]
    known = {field for algorithm in ALGORITHMS for field in leaves(defaults(algorithm))}
    named = [field for row in rows for field in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert len(named) > 20 and set(named) <= known
    for row in rows:
        fields, values = (cell.strip() for cell in row.split("|")[1:3])
        for algorithm in ALGORITHMS:
            for field, value in stated(re.findall(r"`([\w.]+)`", fields), values, algorithm):
                default = get(defaults(algorithm), field, missing := object())
                assert default is missing or same(value, default), (algorithm, field, value, default)


def stated(fields: list[str], values: str, algorithm: str) -> list[tuple[str, str]]:
    """What a row says that an algorithm's fields are by default.

    >>> stated(["a", "b"], "1, `x`", "sft"), stated(["a"], "sft 1, dpo and ppo 2, else 3", "ppo")
    ([('a', '1'), ('b', 'x')], [('a', '2')])
    """
    parts = [part.strip().replace("`", "") for part in values.split(",")]
    of = {name: part.split()[-1] for part in parts for name in part.replace(" and ", " ").split()[:-1]}
    if not of:
        parts *= len(fields) if len(parts) == 1 else 1
        assert len(fields) == len(parts), (fields, values)
        return list(zip(fields, parts, strict=True))
    assert len(fields) == 1 and (algorithm in of or "else" in of), (fields, values)
    return [(fields[0], of.get(algorithm, of.get("else", "")))]


def same(value: str, default: object) -> bool:
    """Whether a text of the table stands for a default."""
    if default in (None, ()):
        return value == "none"
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return value.lower() == str(default).lower()
    return float(value) == default

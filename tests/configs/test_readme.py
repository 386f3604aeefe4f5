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
    shown = {cells[0]: cells[1] for cells in ([c.strip() for c in row.split("|")[1:]] for row in rows)}
    assert shown["`rollout.max_new_tokens`, `rollout.temperature`"] == "128, 1.0"
    for row, values in shown.items():
        fields = re.findall(r"`([\w.]+)`", row)
        if len(fields) == len(values.split(",")) and "`" not in values and "sft" not in values:
            for field, value in zip(fields, values.split(","), strict=True):
                owners = [a for a in ALGORITHMS if field in set(leaves(defaults(a)))]
                default = get(defaults(owners[0]), field)
                assert value.strip() == "none" if default in (None, ()) else float(value) == default, field

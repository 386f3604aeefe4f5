"""Every config file loads, is locked, validates, and is a lab note."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxalign import config as configs

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.py"))
WANTED = ["sft", "reward", "ppo", "dpo", "quickstart", "stories"]


def load(path: Path):
    """The module of a config file."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """The stages of a config: itself where it has none."""
    if "stages" not in config:
        return [("", config)]
    return [(name, config[name]) for name in config.stages]


@pytest.mark.parametrize("name", WANTED)
def test_the_wanted_configs_are_there(name):
    assert any(name in path.stem for path in FILES), f"no config named after {name} in configs/"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_a_config_loads_and_validates(path):
    module = load(path)
    if not hasattr(module, "get_config"):
        pytest.skip("not a config: no get_config()")
    config = module.get_config()
    assert config.is_locked
    for name, section in sections(config):
        configs.validate(section, inputs=False)
        fields = set(configs.leaves(section))
        known = set(configs.leaves(configs.defaults(section.algorithm.name)))
        assert fields == known, f"{name}: {sorted(fields ^ known)}"
    configs.to_dict(config)  # JSON values only


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_a_config_is_a_lab_note(path):
    """Its docstring says the command that runs it."""
    doc = load(path).__doc__ or ""
    assert "jaxalign train" in doc or "launch/" in doc, f"{path.name}: the docstring does not give the command"

"""README and the pages of docs/: their configs load, their commands and links are there, the fields they name exist."""

import re
import shlex
from pathlib import Path

import pytest

from jaxalign import cli
from jaxalign.config import ALGORITHMS, defaults, get, leaves
from jaxalign.functions import load_function
from jaxalign.pipeline import stages
from jaxalign.pipeline.configfile import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
TEXT = "\n".join(PAGES.values())
FILES = dict(re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", TEXT, re.DOTALL))
CONFIGS = sorted(name for name in FILES if name.startswith("configs/"))
KNOWN = {field for algorithm in ALGORITHMS for field in leaves(defaults(algorithm))}
SECTIONS = {field.partition(".")[0] for field in KNOWN if "." in field}


@pytest.fixture
def written(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


def commands(page: str) -> list[list[str]]:
    """The lines of a page's shell blocks as words; comments are gone, continued lines are one."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_whole(written, name):
    """Nothing is left to fill in but the files they name."""
    config = load_config(name)
    found = stages.plan(config)
    assert found and all(not stage.checked.warnings for stage in found)
    if function := get(config, "rewards.function"):
        given = {"records": [], "completion_ids": [], "finished": [], "step": 0}
        assert load_function(function)([], ["please", "no"], **given) == [1, 0]


def test_there_are_configs_of_every_kind():
    assert {"configs/mine.py", "configs/road.py", "configs/polite.py"} <= set(CONFIGS)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_overrides_in_commands_name_fields(written, page):
    for words in commands(page):
        name = next((word.removeprefix("--config=") for word in words if word.startswith("--config=")), "")
        known = set(leaves(load_config(name))) if name in FILES else KNOWN
        for word in words:
            if found := re.match(r"--config\.([\w.]+)=", word):
                assert found[1] in known, (words, found[1])


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_and_their_flags_exist(page, capsys):
    helps = {}
    for words in commands(page):
        if words[0] == "jaxalign":
            if words[1] not in helps:
                cli.main([words[1], "--help"])
                helps[words[1]] = capsys.readouterr().out
            assert helps[words[1]], words
            for flag in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
                field = flag[2:] in KNOWN or any(name.endswith(f".{flag[2:]}") for name in KNOWN)
                assert flag.startswith("--config.") or field or flag in helps[words[1]], (words, flag)
        elif words[0] in ("bash", "python", "sbatch"):
            script = next(word for word in words[1:] if not word.startswith("-"))
            assert (ROOT / script).is_file(), words


@pytest.mark.parametrize("page", sorted(PAGES))
def test_fields_in_text_exist(page):
    """Whatever stands in backquotes and begins with a section's name and a dot, alone or with a value."""
    missing, text = [], PAGES[page]
    if page == "docs/coming_from.md":  # only what a field is called here
        text = "\n".join(line.split("|")[2] for line in text.partition("## Every other")[0].splitlines() if "|" in line)
    for name in re.findall(r"`(?:--config\.)?((?:\w+\.)+\w+)(?:=[^`]*)?`", text):
        known = name.partition(".")[0] in SECTIONS and not name.endswith((".py", ".json", ".jsonl", ".md"))
        if known and name not in KNOWN:
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), (page, target)
        if anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, (page, target)


def test_paths_in_text_exist():
    """Files of the checkout that pages name in backquotes."""
    tops = ("docs/", "jaxalign/", "launch/", "notebooks/", "tests/")
    for page, text in PAGES.items():
        for name in re.findall(r"`([\w./]+)`", text):
            if name.startswith(tops) and page != "CHANGELOG.md":
                assert (ROOT / name).exists(), (page, name)


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", README))
    assert sorted(name for name in PAGES if name.startswith("docs/") and name not in linked) == []


def test_the_tables_of_methods_give_the_defaults():
    for section in re.split(r"^## ", PAGES["docs/methods.md"], flags=re.MULTILINE):
        algorithm = {"SFT": "sft", "Reward model": "reward", "DPO": "dpo", "PPO": "ppo"}.get(section.split("\n")[0])
        for field, value in re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", section, re.MULTILINE) if algorithm else ():
            assert same(value.strip().strip("`"), get(defaults(algorithm), field)), (algorithm, field, value)


def same(value: str, default: object) -> bool:
    """Whether a text of a table stands for a default."""
    if default in (None, ()):
        return value == "none"
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return value.lower() == str(default).lower()
    return float(value) == default

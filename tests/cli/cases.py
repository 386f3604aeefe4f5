"""Inputs that the default tests and the oracle tests of the command line share."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import jax

from jaxalign.cli import main

LINES = [
    ("Once upon a time", ", there was a little girl named Lily."),
    ("Once", ""),
    ("The dog was very", " happy"),
    ("", "Tom went home."),
    ("Zoë said: “日本語 🦊”", " déjà vu\n\nand a new line"),
    ("One day, a boy named Tim went to the park. " * 6, "He saw a big tree. " * 5),
    ("The end", ".</s>"),
    ("a", "b"),
]


def write_lines(path: Path, lines=LINES) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines), encoding="utf-8")
    return str(path)


def make_reward(base: Path, directory: Path) -> str:
    """A reward model: a language model with a fresh scalar head, exported."""
    from jaxalign.models.export import save
    from jaxalign.models.hf import load

    key = jax.random.key(7)
    model, params = load(base, dtype="float32", param_dtype="float32", remat="none", head="score", key=key)
    return str(save(directory, model, params, source=base))


def with_context(model: Path, directory: Path, tokens: int) -> str:
    """The model, saying that it was made for so many tokens."""
    directory.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (directory / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return str(directory)


def copied(model: Path, directory: Path, **config) -> Path:
    """A copy of a model that may be written, with other fields in its `config.json`."""
    shutil.copytree(model, directory)
    for file in directory.iterdir():
        file.chmod(0o644)
    old = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(old | config))
    return directory


def with_token(directory: Path, token: str = "<|extra|>") -> Path:
    """Gives the tokenizer of a model one token more, behind all others."""
    file = directory / "tokenizer.json"
    tree = json.loads(file.read_text())
    last = max(tree["model"]["vocab"].values())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    tree["added_tokens"].append({"id": last + 1, "content": token, "special": True, **flags})
    file.write_text(json.dumps(tree))
    return directory


def run(*argv: str) -> list[dict]:
    """Runs a command that prints JSON lines."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(list(argv)) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]

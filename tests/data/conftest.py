"""Tokenizers and templates that the tests of this folder share."""

import functools
import json
from pathlib import Path

import pytest

TOKENIZERS = (
    "tokenizers/gpt-neox-20b",
    "tokenizers/gpt2",
    "tokenizers/llama2-spm",
    "tokenizers/minimind-6400",
    "tokenizers/mistral-v3-spm",
    "tokenizers/qwen2-rebuilt",
    "models/stories260k-llama",
    "models/stories3m-llama",
)


@functools.cache
def _load(path: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def tokenizer_of(shared: Path):
    """name -> one of the shared tokenizers, loaded once."""
    return lambda name: _load(str(shared / name))


@pytest.fixture(scope="session", params=TOKENIZERS, ids=lambda name: name.split("/")[1])
def tokenizer(request, tokenizer_of):
    """Every shared tokenizer in turn."""
    return tokenizer_of(request.param)


@pytest.fixture(scope="session")
def polite_rude(shared: Path) -> list[dict]:
    """1,100 real pairs."""
    return json.loads((shared / "data/rasbt-preference/instruction-data-with-preference.json").read_text())

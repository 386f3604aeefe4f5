"""A reference of another path must read ids as the policy does."""

import json
import shutil

import pytest

from jaxalign.errors import InputError
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.train.algorithms import check_tokens


def test_trap_reference_with_other_tokens_is_refused(shared, tmp_path):
    model = shared / "models" / "stories260k-llama"
    tokenizer = load_tokenizer(str(model))
    check_tokens(str(model), tokenizer)

    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "tokenizer.json"
    file.chmod(0o644)
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    first, second = [token for token, i in vocab.items() if i in (400, 401)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"2 tokens of the reference .* are not the policy's"):
        check_tokens(str(other), tokenizer)

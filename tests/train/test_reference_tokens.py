"""A reference or a value model of another path must read ids as the policy does."""

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


def test_trap_a_value_model_without_tokens_of_the_policy_is_refused(shared, tmp_path):
    """Its rows for them, if it has some to spare, were never trained; tokens that it has beside them are no matter."""
    model = str(shared / "models" / "stories260k-llama")
    more = load_tokenizer(model)
    more.add_tokens(["<|im_start|>"])
    with pytest.raises(InputError, match=r"1 tokens of the value model .*'<\|im_start\|>' is None there") as caught:
        check_tokens(model, more, field="value_path")
    assert caught.value.fix.startswith("--config.algorithm.value_path=None")
    more.save_pretrained(tmp_path)
    check_tokens(str(tmp_path), load_tokenizer(model), field="value_path")
    with pytest.raises(InputError, match="tokens of the reference"):
        check_tokens(str(tmp_path), load_tokenizer(model))

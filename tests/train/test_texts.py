"""Completions as the text that rewards and logs see."""

from types import SimpleNamespace

import numpy as np
import pytest
from ppo_world import NumberTokenizer, record

from jaxalign.train.texts import read_samples


class Marked(NumberTokenizer):
    """Its token 4 ends turns, is added, and is not called special."""

    added_tokens_decoder = {4: "<end>"}  # noqa: RUF012


@pytest.mark.parametrize(("tokenizer", "last"), [(Marked(), "7"), (NumberTokenizer(), "7 4")])
def test_a_marker_that_is_not_special_is_no_text(tokenizer, last):
    tokens = np.array([[7, 4, 0], [7, 9, 8], [7, 4, 9], [4, 0, 0]])
    present = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
    batch = SimpleNamespace(
        record_ids=np.arange(4)[:, None],
        completions=SimpleNamespace(mask=np.ones((4, 1), bool)),
        rows=SimpleNamespace(tokens=np.array([[1, 6]] * 4), attend_start=np.zeros((4, 2), int)),
    )
    rollout = SimpleNamespace(tokens=tokens, present=present, finished=np.array([True, False, False, True]))
    said = read_samples(batch, rollout, 0, records=record, tokenizer=tokenizer, stop_ids=(3, 4))[0]
    texts = [text.strip() for text in said.completions]
    assert texts == [last, "7 9 8", "7 4 9", "" if last == "7" else "4"]
    assert said.completion_ids == [[7, 4], [7, 9, 8], [7, 4, 9], [4]], "rewards may still see the end"

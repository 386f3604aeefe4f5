"""A record's own `chat_template_kwargs` against TRL's rendering of the same rows."""

import copy

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxalign.data.records import Record
from jaxalign.data.tokenize import Encoder, tokenize_records
from tests.data.thinking import HYBRID

trl = pytest.importorskip("trl.data_utils")

U, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
GOOD, BAD = ([{"role": "assistant", "content": word}] for word in ("Yes?", "No."))
ROWS = {
    "messages": {"messages": [SYSTEM, U, *GOOD, U, *BAD]},
    "completion": {"prompt": [SYSTEM, U], "completion": GOOD},
    "pair": {"prompt": [U], "chosen": GOOD, "rejected": BAD},
    "prompt": {"prompt": [U, *GOOD, U]},
}


@pytest.mark.parametrize("values", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("form", ROWS)
def test_rows_with_values_of_their_own_are_trls(shared, form, values):
    tokenizer = copy.copy(AutoTokenizer.from_pretrained(shared / "tokenizers" / "minimind-6400"))
    tokenizer.chat_template = HYBRID
    text = trl.apply_chat_template({**ROWS[form], "chat_template_kwargs": values}, tokenizer)
    record = Record(0, "x", 1, form, **ROWS[form], columns={"chat_template_kwargs": values})
    (got,) = tokenize_records([record], Encoder(tokenizer), append_eos=False)
    sides = [text["text"]] if form == "messages" else [text["prompt"] + text[s] for s in text if s != "prompt"]
    for i, side in enumerate(sides or [text["prompt"]]):
        ours = np.concatenate([got.prompt, *got.completions[i : i + 1]]).tolist()
        assert tokenizer.decode(ours) == (side if form == "prompt" else side.rstrip("\n"))

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxalign.data.dialogues import render_plain
from jaxalign.data.records import Record
from jaxalign.evaluate.heldout import questions, references


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


RECORDS = [
    Record(0, "d", 1, "text", text="a whole text"),
    Record(1, "d", 2, "completion", prompt="say", completion=" yes"),
    Record(2, "d", 3, "messages", messages=[user("one"), assistant("two"), user("three"), assistant("four")]),
    Record(3, "d", 4, "pair", prompt="say", chosen=" good", rejected=" bad"),
    Record(4, "d", 5, "prompt", prompt=[user("five")]),
    Record(5, "d", 6, "pair", prompt=[user("a"), assistant("b")], chosen=[user("c")], rejected=[user("e")]),
    Record(6, "d", 7, "pair", prompt=[assistant("b")], chosen=[user("c"), assistant("d")], rejected=[user("e")]),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    vocabulary = {"</s>": 0, **{chr(c): i for i, c in enumerate((10, *range(32, 127)), 1)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def test_prompts_end_where_the_assistant_speaks_next():
    assert [(q.record.index, q.prompt) for q in questions(RECORDS)] == [
        (1, "say"),
        (2, [user("one"), assistant("two"), user("three")]),
        (3, "say"),
        (4, [user("five")]),
        (5, [user("a")]),
    ]


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def test_references_are_the_datas_own_answers(tokenizer):
    found = references(RECORDS[:4], tokenizer, (0,), render_plain)
    scored = [text(tokenizer, [t for t, s in zip(f.completion, f.scored, strict=True) if s]) for f in found]
    assert [s.replace("</s>", "|").strip() for s in scored][1] == "yes|"
    assert text(tokenizer, found[1].prompt) == "say"
    assert scored[3] == " good</s>"  # the chosen side
    assert "two" in scored[2] and "four" in scored[2] and "three" not in scored[2]
    whole = text(tokenizer, [*found[0].prompt, *found[0].completion])
    assert whole == "a whole text</s>"


def test_prompts_have_no_answer(tokenizer):
    assert references([RECORDS[4]], tokenizer, (0,), render_plain) == []

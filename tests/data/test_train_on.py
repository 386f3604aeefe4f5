"""What of a record is learned: the completion, its last turn, everything, or chosen roles, and which ends of turns."""

import copy
import json

import numpy as np
import pytest

from jaxalign.config import defaults, validate
from jaxalign.data.build import from_records
from jaxalign.data.dialogues import render_plain
from jaxalign.data.mixture import load_records
from jaxalign.data.records import Record
from jaxalign.data.tokenize import Encoder, tokenize_records
from jaxalign.errors import InputError
from jaxalign.registry import COMPLETIONS

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": "Ask the clock."},
    {"role": "tool", "content": "Four."},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
]
# Rewrites its beginning with every turn, so that no part is a prefix of the whole.
COUNTS = (
    "{{ messages | length }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = "<|im_end|>"
PIECES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "So:{% endgeneration %} -- {% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learned(tokenizer, record, plain=None, **options):
    (example,) = tokenize_records([record], Encoder(tokenizer, (), plain), append_eos=True, **options)
    mask, tokens = example.masks[0], example.completions[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    runs = [tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [run.rstrip("\n") for run in runs], example


@pytest.fixture(scope="module", params=["as it is", "counts"])
def qwen(request, tokenizer_of):
    tokenizer = copy.copy(tokenizer_of("tokenizers/qwen2-rebuilt"))
    if request.param == "counts":
        tokenizer.chat_template = COUNTS
    return tokenizer


def said(*places):
    return [CHAT[i]["content"] + END for i in places]


@pytest.mark.parametrize(
    ("train_on", "want"),
    [
        ("completion", said(2, 4, 6)),
        ("last", said(6)),
        ("assistant", said(2, 4, 6)),
        ("user", said(1, 5)),
        ("assistant,tool", said(2, 3, 4, 6)),
        ("tool, user", said(1, 3, 5)),
        ("system,user,assistant,tool", said(*range(7))),
    ],
)
def test_roles_and_the_last_turn(qwen, train_on, want):
    chat = Record(0, "x", 1, "messages", messages=CHAT)
    runs, example = learned(qwen, chat, train_on=train_on)
    assert runs == want and example.complete == (True,)
    whole = qwen.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    tokens = [*example.prompt.tolist(), *example.completions[0].tolist()]
    assert tokens == whole[: len(tokens)], "what is learned changes the mask, never the tokens"


@pytest.mark.parametrize("words", ["s", "user", "m", "im_end"])
def test_words_that_are_in_the_markers_too_begin_at_their_own_place(qwen, words):
    chat = [{"role": role, "content": words} for role in ("user", "assistant", "user", "assistant")]
    record = Record(0, "x", 1, "messages", messages=chat)
    assert learned(qwen, record, train_on="user")[0] == [words + END] * 2
    assert learned(qwen, record, train_on="assistant,user")[0] == [words + END] * 4


def test_a_last_turn_that_is_marked_in_pieces_is_all_of_them(tokenizer_of):
    tokenizer = copy.copy(tokenizer_of("tokenizers/qwen2-rebuilt"))
    tokenizer.chat_template = PIECES
    record = Record(0, "x", 1, "messages", messages=CHAT[1:3] + CHAT[5:])
    for train_on, want in (("completion", ["So:", *said(2), "So:", *said(6)]), ("last", ["So:", *said(6)])):
        assert [run.strip() for run in learned(tokenizer, record, train_on=train_on)[0]] == want


def test_nothing_is_appended_behind_the_end_of_the_last_turn(qwen):
    record = Record(0, "x", 1, "messages", messages=CHAT[1:3])
    (run,), example = learned(qwen, record, train_on="all")
    assert run.endswith(said(2)[0]) and example.complete == (True,)
    whole = qwen.apply_chat_template(record.messages, return_dict=True)["input_ids"]
    assert [*example.prompt.tolist(), *example.completions[0].tolist()] == whole[:-1]  # but for the newline


def test_turns_of_the_prompt_count_for_roles_alone(qwen):
    record = Record(0, "x", 1, "completion", prompt=CHAT[:6], completion=CHAT[6:])
    assert learned(qwen, record)[0] == learned(qwen, record, train_on="last")[0] == said(6)
    assert learned(qwen, record, train_on="assistant")[0] == said(2, 4, 6)


def test_messages_of_weight_zero_are_left_out_of_every_role(qwen):
    chat = [{**m, "weight": 0} if i in (2, 3, 6) else m for i, m in enumerate(CHAT)]
    record = Record(0, "x", 1, "messages", messages=chat)
    assert learned(qwen, record)[0] == said(4)
    assert learned(qwen, record, train_on="last")[0] == said(4)
    assert learned(qwen, record, train_on="assistant,tool,user")[0] == said(1, 4, 5)


@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_ends_of_turns(qwen, train_on):
    record = Record(0, "x", 1, "messages", messages=CHAT)
    bare = [run.removesuffix(END) for run in said(2, 4, 6)]
    runs, example = learned(qwen, record, train_on=train_on, train_on_eos="last")
    assert runs == [*bare[:2], bare[2] + END] and example.complete == (True,)
    runs, example = learned(qwen, record, train_on=train_on, train_on_eos="none")
    assert runs == bare and example.complete == (False,)
    text = Record(0, "x", 1, "completion", prompt="Q", completion=" A")
    assert learned(qwen, text)[0] == [f" A{END}"] and learned(qwen, text, train_on_eos="none")[0] == [" A"]


def test_strings_are_a_users_and_an_assistants(tokenizer_of):
    tokenizer = tokenizer_of("tokenizers/gpt2")
    record = Record(0, "x", 1, "completion", prompt="A question", completion=" an answer")
    end = tokenizer.eos_token
    for train_on, want in (
        ("last", f" an answer{end}"),
        ("assistant", f" an answer{end}"),
        ("assistant,user", f"A question an answer{end}"),  # behind a BOS
    ):
        assert learned(tokenizer, record, train_on=train_on)[0] == [want]
    text = Record(0, "x", 1, "text", text="Once upon")
    assert learned(tokenizer, text, train_on="last")[0] == learned(tokenizer, text)[0]


def test_plain_dialogues(tokenizer_of):
    tokenizer = tokenizer_of("models/stories3m-llama")
    record = Record(0, "x", 1, "messages", messages=CHAT[1:3] + CHAT[5:])
    runs, _ = learned(tokenizer, record, render_plain, train_on="last")
    assert [run.strip() for run in runs] == ["Welcome.</s>"]
    runs, _ = learned(tokenizer, record, render_plain, train_on="user")
    assert [run.strip() for run in runs[:1]] == ["Time?"]


@pytest.mark.parametrize("train_on", ["completion", "last", "all", "assistant", "assistant,tool", "user, tool"])
def test_the_config_takes_them(train_on, tmp_path):
    config = defaults("sft")
    config.workdir, config.model.path, config.data.sources = "w", "m", ("x.jsonl",)
    config.data.train_on = train_on
    validate(config)
    for wrong in ("assistent", "assistant,bot", "", "last,assistant"):
        config.data.train_on = wrong
        with pytest.raises(InputError, match="train_on"):
            validate(config)


def test_it_reaches_the_batches(tokenizer_of, tmp_path):
    config = defaults("sft")
    config.workdir, config.data.packing, config.batch_size = str(tmp_path), False, 1
    scored = {}
    for train_on in ("completion", "last", "assistant,user", "all"):
        config.data.train_on = train_on
        records = [Record(0, "x", 1, "messages", messages=CHAT)]
        dataset = from_records(records, config, tokenizer_of("tokenizers/qwen2-rebuilt"))
        scored[train_on] = int(dataset.batch(0).readouts.mask.sum())
    assert scored["last"] < scored["completion"] < scored["assistant,user"] < scored["all"]


def test_weights_between_nothing_and_one_are_refused(tmp_path):
    rows = [{"messages": [CHAT[1], {**CHAT[2], "weight": weight}]} for weight in (1, 0.5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"message 2 has the weight 0\.5"):
        load_records(str(tmp_path / "x.jsonl"), COMPLETIONS)

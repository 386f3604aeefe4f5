"""Thoughts in chat templates: which are learned, empty ones that are not, and answers that a template rewrites."""

import copy
import random

import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data.build import from_records
from jaxalign.data.dialogues import render_plain
from jaxalign.data.records import Notes, Record
from jaxalign.data.report import as_text
from jaxalign.data.template_inputs import set_defaults
from jaxalign.data.tokenize import LOST, OTHER_START, REWRITTEN, Dropped, Encoder, tokenize_records
from tests.data.thinking import CHANNELS, HYBRID, HYBRID_MARKED, OPENED, SWITCH

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
WHO, ME = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
THOUGHT = {"role": "assistant", "content": "Yes?", "reasoning_content": "Because."}
EMPTY = "<think>\n\n</think>\n\n"
SAID = "<think>\nBecause.\n</think>\n\nYes?<|im_end|>"
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of):
    return tokenizer_of("tokenizers/minimind-6400")


def templated(tokenizer, template=HYBRID, **values):
    clone = copy.copy(tokenizer)
    clone.chat_template = template
    set_defaults(clone, values, "--flag")
    return clone


def runs(tokenizer, tokens, mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def learned(tokenizer, record, notes=None, **options):
    """The runs of scored tokens of each completion, as text."""
    (got,) = tokenize_records([record], Encoder(tokenizer), append_eos=False, notes=notes, **options)
    assert not isinstance(got, Dropped), got
    return [runs(tokenizer, c, m) for c, m in zip(got.completions, got.masks, strict=True)]


def chat(*messages, index=0):
    return Record(index, "x.json", index + 1, "messages", messages=list(messages))


@pytest.mark.parametrize("values", [{}, ON, OFF])
@pytest.mark.parametrize(
    ("messages", "want"),
    [
        ([U, A], ["Yes?<|im_end|>"]),
        ([U, THOUGHT], [SAID]),
        ([U, {**A, "content": "<think>Because.</think>Yes?"}], [SAID]),
        ([U, {**A, "thinking": "Because."}], [SAID]),
        ([U, {**A, "reasoning": "Because.", "thinking": None}], [SAID]),
        ([U, A, WHO, ME], ["Yes?<|im_end|>", "Me.<|im_end|>"]),
        ([U, {**A, "content": "<b>Yes?</b>"}, WHO, ME], ["<b>Yes?</b><|im_end|>", "Me.<|im_end|>"]),
        ([U, A, WHO, {**ME, "reasoning_content": "Because."}], ["Yes?<|im_end|>", SAID.replace("Yes?", "Me.")]),
        ([U, THOUGHT, WHO, ME], ["Me.<|im_end|>"]),
        ([U, THOUGHT, {"role": "tool", "content": "4"}, THOUGHT], [SAID, SAID]),
        ([U, A, {"role": "tool", "content": "4"}, ME], ["Yes?<|im_end|>", "Me.<|im_end|>"]),
        ([U, THOUGHT, WHO, A, {"role": "tool", "content": "4"}, THOUGHT], ["Yes?<|im_end|>", SAID]),
    ],
)
def test_what_is_learned_of_a_conversation(tokenizer, messages, want, values):
    if values == OFF:  # a prompt with an empty block: of thoughts that come after all, what follows the block's start
        want = [said.removeprefix("<think>\n") for said in want]
    (got,) = learned(templated(tokenizer, **values), chat(*messages))
    assert got == want


def test_an_empty_block_that_the_data_has_is_learned(tokenizer):
    written = {**A, "content": f"{EMPTY}Yes?"}
    assert learned(templated(tokenizer), chat(U, written)) == [[f"{EMPTY}Yes?<|im_end|>"]]
    assert learned(templated(tokenizer, **OFF), chat(U, written)) == [["Yes?<|im_end|>"]]


def test_masks_are_those_of_marks_in_the_template(tokenizer):
    """Random conversations; the oracle is transformers' mask of the same template with marks."""
    encoder, marked = Encoder(templated(tokenizer)), templated(tokenizer, HYBRID_MARKED)
    rng = random.Random(0)
    for number in range(60):
        messages = [{"role": "system", "content": "Be brief."}] * (rng.random() < 0.3)
        for turn in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": f"Question {turn}?"})
            for step in range(rng.randint(1, 3)):
                said = rng.choice([f"Answer {step}", "<b>x</b>", "A [think] B", "4"])
                thought = rng.choice([None, None, "Let me see.\n\nSo."])
                inline = bool(thought) and rng.random() < 0.5
                messages += [{"role": "tool", "content": "out"}] * (step > 0)
                messages.append(
                    {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{said}" if inline else said}
                )
                if thought and not inline:
                    messages[-1]["reasoning_content"] = thought
        want = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        (got,) = tokenize_records([chat(*messages)], encoder, append_eos=False)
        tokens = [*got.prompt, *got.completions[0]]
        assert tokens == want["input_ids"][: len(tokens)], number
        scored = [*np.zeros(len(got.prompt), bool), *got.masks[0]]
        assert scored == list(map(bool, want["assistant_masks"][: len(tokens)])), (number, messages)
        assert not any(want["assistant_masks"][len(tokens) :])


@pytest.mark.parametrize(
    ("template", "values", "messages", "want", "other"),
    [
        (OPENED, {}, [U, {**A, "thinking": "Because."}], ["Because.\n</think>\n\nYes?<|im_end|>"], False),
        (OPENED, {}, [U, A], ["Yes?<|im_end|>"], False),
        (SWITCH, {"thinking": False}, [U, A, WHO, ME], ["Yes?<|im_end|>", "Me.<|im_end|>"], False),
        (SWITCH, {"thinking": True}, [U, A, WHO, ME], ["Yes?<|im_end|>", "Me.<|im_end|>"], True),
        (
            CHANNELS,  # which end an earlier answer would have is not known
            {},
            [U, A, WHO, ME],
            ["<channel>final<message>Yes?", "<channel>final<message>Me.<|im_end|>"],
            False,
        ),
        (
            CHANNELS,
            {},
            [U, {**A, "reasoning_content": "Because."}, WHO, {**ME, "thinking": "Hm."}],
            ["<channel>analysis<message>Hm.<end><start>assistant<channel>final<message>Me.<|im_end|>"],
            False,
        ),
    ],
)  # fmt: skip
def test_templates_of_other_kinds(tokenizer, template, values, messages, want, other):
    notes = Notes()
    assert learned(templated(tokenizer, template, **values), chat(*messages), notes) == [want]
    assert (notes[OTHER_START] == 1) == other


def test_thoughts_are_learned_where_no_part_is_a_prefix_of_the_whole(tokenizer):
    counting = "{{ messages | length }}\n" + HYBRID
    assert learned(templated(tokenizer, counting), chat(U, THOUGHT)) == [[SAID]]
    assert learned(
        templated(tokenizer, "{{ messages | length }}\n" + OPENED), chat(U, {**A, "thinking": "Because."})
    ) == [[SAID.removeprefix("<think>\n")]]


def test_a_pair_of_an_answer_with_thoughts_and_one_without(tokenizer):
    pair = Record(0, "x", 1, "pair", prompt=[U], chosen=[A], rejected=[THOUGHT])
    assert learned(templated(tokenizer), pair) == [["Yes?<|im_end|>"], [SAID]]
    notes = Notes()
    assert learned(templated(tokenizer, **OFF), pair, notes) == [["Yes?<|im_end|>"], [SAID.removeprefix("<think>\n")]]
    assert notes[OTHER_START] == 1
    (got,) = tokenize_records([pair], Encoder(templated(tokenizer, **OFF)), append_eos=False)
    assert tokenizer.decode(got.completions[0]) == "\n</think>\n\nYes?<|im_end|>", "the prompt is what both share"


def test_other_choices_of_what_is_learned(tokenizer):
    messages, hybrid = [U, THOUGHT, WHO, THOUGHT, {**WHO}, ME], templated(tokenizer)
    notes = Notes()
    assert learned(hybrid, chat(*messages), notes, train_on="last") == [["Me.<|im_end|>"]]
    assert REWRITTEN not in notes
    (everything,) = learned(hybrid, chat(*messages), notes, train_on="all")
    assert len(everything) == 1 and REWRITTEN not in notes
    assert learned(hybrid, chat(*messages), notes, train_on="assistant,user") == [
        ["Hi<|im_end|>", "Who?<|im_end|>", "Who?<|im_end|>", "Me.<|im_end|>"]
    ]
    assert notes[REWRITTEN] == 1
    assert learned(hybrid, chat(U, {**THOUGHT, "weight": 0}, WHO, ME), notes) == [["Me.<|im_end|>"]]
    assert notes[REWRITTEN] == 1, "it would not have been learned anyhow"


def test_answers_that_are_rewritten_are_told_before_training(tokenizer, tmp_path):
    config = defaults("sft")
    config.workdir, config.data.packing = str(tmp_path), False
    records = [chat(U, THOUGHT, WHO, THOUGHT, WHO, ME, index=i) for i in range(3)] + [chat(U, A, WHO, ME, index=3)]
    for _ in range(2):  # from records, and from the cache
        report = from_records(records, config, templated(tokenizer)).report
        assert report["rewritten"] == {"records": 3, "answers": 6}
        (told,) = (w for w in report["warnings"] if "rewrites" in w)
        assert "x.json:1 message 2, :2 message 2" in told and "6 of 3 records" in told and "not trained on" in told
        assert "data.train_on=last" in told and told in as_text(report)
    config.data.train_on = "last"
    assert not any("rewrites" in w for w in from_records(records, config, templated(tokenizer)).report["warnings"])


def test_a_record_of_rewritten_answers_alone_is_left_out_with_the_reason(tokenizer):
    (got,) = tokenize_records([chat(U, THOUGHT, WHO)], Encoder(templated(tokenizer)), append_eos=False)
    assert isinstance(got, Dropped) and got.reason == REWRITTEN


def test_a_prompt_that_no_answer_begins_with_is_told(tokenizer, tmp_path):
    """A template whose prompt closes the thoughts that the data has, as minimind's own does."""
    config = defaults("sft")
    config.workdir, config.data.packing = str(tmp_path), False
    records = [chat(U, THOUGHT, index=i) for i in range(3)]
    for one, want in (
        (tokenizer, True),
        (templated(tokenizer, tokenizer.chat_template, open_thinking=True), False),
        (templated(tokenizer), False),
        (templated(tokenizer, **OFF), True),
    ):
        report = from_records(records, config, one).report
        assert report["other_start"] == 3 * want
        told = [w for w in report["warnings"] if OTHER_START in w]
        assert bool(told) == want and all("data.chat_template_kwargs" in w and "x.json:1" in w for w in told)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_no_template_reads_are_told(key, tokenizer_of, tokenizer, tmp_path):
    config = defaults("sft")
    config.workdir, config.data.packing = str(tmp_path), False
    records = [chat(U, {**A, key: "Because."}, index=i) for i in range(3)]
    reads_none = templated(tokenizer, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ thinking }}")
    for one in (reads_none, tokenizer_of("tokenizers/gpt2")):
        report = from_records(records, config, one).report
        assert report["lost"] == {"reasoning": 3}
        (told,) = (w for w in report["warnings"] if "hold thoughts" in w)
        assert "<think>...</think>" in told and "chat_template" in told
    notes = Notes()
    list(tokenize_records(records, Encoder(templated(tokenizer), (), render_plain), append_eos=False, notes=notes))
    assert not any(name.startswith(LOST) for name in notes)

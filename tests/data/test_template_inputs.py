"""Values of names that a chat template reads: written into it, the same for every rendering."""

import copy
import json

import numpy as np
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from jaxalign.data.records import Notes, Record
from jaxalign.data.template import ChatTemplate
from jaxalign.data.template_inputs import inputs_of, names_read, set_defaults, unread
from jaxalign.data.tokenize import LOST, Encoder, tokenize_records
from jaxalign.errors import InputError
from jaxalign.relations import template_kwargs
from tests.data.thinking import HYBRID

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ style + m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture
def tokenizer(tokenizer_of):
    clone = copy.copy(tokenizer_of("tokenizers/minimind-6400"))
    clone.chat_template = HYBRID
    return clone


def given(tokenizer, template=None, **values):
    clone = copy.copy(tokenizer)
    clone.chat_template = template or clone.chat_template
    set_defaults(clone, values, "--flag")
    return clone


def prompt(tokenizer, **values):
    return tokenizer.apply_chat_template([U], tokenize=False, add_generation_prompt=True, **values)


def test_a_value_in_the_template_is_the_value_given_to_each_rendering(tokenizer):
    off, on = (given(tokenizer, enable_thinking=value) for value in (False, True))
    assert (
        prompt(off)
        == prompt(tokenizer, enable_thinking=False)
        == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{EMPTY}"
    )
    assert prompt(on) == prompt(tokenizer, enable_thinking=True) == prompt(tokenizer)
    assert prompt(off, enable_thinking=True) == prompt(tokenizer), "whoever renders has the last word"
    for messages in ([U, A], [U, A, U, A]):
        assert off.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
            messages, tokenize=False
        )


STRANGE = 'it\'s "so"\n\\n %} }} {{ {% endif %} {# é 日本 🦊 \x01 \u2028'
VALUES = [
    True,
    False,
    None,
    0,
    -3,
    1.5e-20,
    1e300,
    "",
    STRANGE,
    [],
    [1, ["a", None]],
    {"a": {"b": [True, {"c": -1.5}]}},
]


@pytest.mark.parametrize("value", VALUES)
def test_any_value_of_json_is_what_the_template_reads(tokenizer, value):
    """The oracle is Jinja's rendering with the value as an argument."""
    reads = "\n  {{ style is string }}{{ style | tojson }}|{% for m in messages %}{{ style }}{% endfor %}\n"
    want = _compile_jinja_template(reads).render(messages=[U, A], style=value)
    assert given(tokenizer, reads, style=value).apply_chat_template([U, A], tokenize=False) == want


@pytest.mark.parametrize(
    "start", ["", "\n", "  ", "\n\n  x ", "{% if 1 %}\n  y{% endif %}", "{{- 'a' }}", "\t{%- if 1 %}b{%- endif %}"]
)
def test_nothing_but_the_value_comes_into_the_text(tokenizer, start):
    reads = start + "{% for m in messages %}{{ m.content }}{{ style }}{% endfor %}"
    want = given(tokenizer, reads).apply_chat_template([U, A], tokenize=False, style="z")
    assert given(tokenizer, reads, style="z").apply_chat_template([U, A], tokenize=False) == want


def test_an_export_has_its_values_already_and_a_later_stage_may_have_others(tokenizer):
    off = given(tokenizer, enable_thinking=False)
    assert given(off, enable_thinking=False).chat_template == off.chat_template
    assert prompt(given(off, enable_thinking=True)) == prompt(tokenizer)


def test_templates_by_name_all_get_the_value(tokenizer):
    both = given(tokenizer, {"default": HYBRID, "tool_use": HYBRID + "{{ tools }}"}, enable_thinking=False)
    assert prompt(both).endswith(EMPTY) and EMPTY in prompt(both, tools=[{"a": 1}])


def test_generation_marks_hold_beside_values(tokenizer):
    marked, plain = given(tokenizer, MARKED, style="~"), given(tokenizer, MARKED)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    want = plain.apply_chat_template([U, A, U, A], style="~", **options)
    for one, columns in ((marked, {}), (plain, {"chat_template_kwargs": {"style": "~"}})):
        record = Record(0, "x", 1, "messages", messages=[U, A, U, A], columns=columns)
        (got,) = tokenize_records([record], Encoder(one), append_eos=False)
        assert [*got.prompt, *got.completions[0]] == want["input_ids"]
        assert [*np.zeros(len(got.prompt), bool), *got.masks[0]] == list(map(bool, want["assistant_masks"]))


def test_the_names_that_a_template_reads(tokenizer, tokenizer_of):
    assert names_read(HYBRID) == {"enable_thinking"}
    assert names_read(MARKED) == {"style", "eos_token"}
    assert names_read(tokenizer_of("tokenizers/minimind-6400").chat_template) == {"open_thinking"}
    assert names_read(given(tokenizer, enable_thinking=False).chat_template) == {"enable_thinking"}
    assert (
        names_read("{% if strftime_now is defined %}{% for m in messages %}{% break %}{% endfor %}{% endif %}") == set()
    )
    assert unread(None, ["a"]) == ["a"] and unread({"default": HYBRID, "x": "{{ a }}"}, ["a", "b"]) == ["b"]


@pytest.mark.parametrize(
    ("template", "values", "found", "fix"),
    [
        (None, {"enable_thinkin": True}, "'enable_thinkin', which the", "--flag='{\"enable_thinking\": true}'"),
        (None, {"messages": []}, "'messages'", "enable_thinking"),
        (MARKED, {"eos_token": "x"}, "'eos_token'", "style"),
        ("{{ messages }}", {"think": 1}, "'think'", "without --flag"),
        ("{% for", {"think": 1}, "line 1", "chat_template=FILE"),
    ],
)  # fmt: skip
def test_a_name_that_no_rendering_would_read_is_refused(tokenizer, template, values, found, fix):
    with pytest.raises(InputError) as error:
        given(tokenizer, template, **values)
    assert found in error.value.found and fix in error.value.fix


def test_values_without_a_template_are_refused(tokenizer_of):
    with pytest.raises(InputError, match="has no chat template"):
        given(tokenizer_of("tokenizers/gpt2"), think=True)


def test_a_record_may_have_values_of_its_own(tokenizer):
    """As TRL's column: each row's values go to its rendering, over those of the configuration."""
    columns = [
        {},
        {"chat_template_kwargs": {"enable_thinking": False, "other": None}},
        {"chat_template_kwargs": '{"enable_thinking": true}'},
    ]
    records = [Record(i, "x", i + 1, "prompt", prompt=[U], columns=c) for i, c in enumerate(columns)]
    for one, want in ((tokenizer, [0, 1, 0]), (given(tokenizer, enable_thinking=False), [1, 1, 0])):
        made = list(tokenize_records(records, Encoder(one), append_eos=False))
        assert [EMPTY in tokenizer.decode(e.prompt) for e in made] == list(map(bool, want))
    said = ChatTemplate(tokenizer).prompt([U], inputs_of(columns[1]))
    assert said == prompt(tokenizer, enable_thinking=False)


def test_a_records_name_that_is_never_read_is_counted(tokenizer):
    notes = Notes()
    columns = {"chat_template_kwargs": {"thinking": False}}
    records = [Record(i, "x", i + 1, "messages", messages=[U, A], columns=columns) for i in range(3)]
    list(tokenize_records(records, Encoder(tokenizer), append_eos=False, notes=notes))
    assert notes == {f"{LOST}chat_template_kwargs thinking": 3}


@pytest.mark.parametrize("values", ["[1]", "x", 3, {"messages": []}, {"tools": 1}])
def test_a_records_values_that_are_none_are_told_by_their_line(tokenizer, values):
    record = Record(0, "x.jsonl", 7, "messages", messages=[U, A], columns={"chat_template_kwargs": values})
    with pytest.raises(InputError, match=r"record 0 \(line 7 of x\.jsonl\): .*chat_template_kwargs"):
        list(tokenize_records([record], Encoder(tokenizer), append_eos=False))


def test_the_forms_in_which_values_are_given():
    pairs = (["a", 1], ("b", [1, {"c": None}]))
    assert (
        template_kwargs(pairs) == template_kwargs(({"a": 1, "b": (1, {"c": None})},)) == {"a": 1, "b": [1, {"c": None}]}
    )
    assert template_kwargs(None) == template_kwargs(()) == {}
    for wrong in (
        "a=1",
        ("a",),
        [1],
        [["a b", 1]],
        [["a", 1], ["a", 2]],
        [["a", float("nan")]],
        [["a", json]],
        [[1, 2]],
    ):
        with pytest.raises(InputError, match="chat_template_kwargs"):
            template_kwargs(wrong)

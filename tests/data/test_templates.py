"""Assistant spans under chat templates of many kinds; the oracle is the same template with generation marks."""

import copy

import numpy as np
import pytest

from jaxalign.data.dialogues import render_plain
from jaxalign.data.records import Record
from jaxalign.data.template import ChatTemplate
from jaxalign.data.tokenize import Encoder, tokenize_records
from jaxalign.data.turns import common_prefix
from jaxalign.errors import InputError

# Each has the marks of what the assistant says; without them it is a template as people have it.
MARKED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "no end of turn": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m['content'] + '\n' }}"
        "{% endgeneration %}{% else %}{{ 'U: ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    ),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<<SYS>>Be kind.<</SYS>>' }}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ '<model>' }}{% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
    ),
    # Earlier turns lose their thoughts, as in Qwen3: no render of a part is a prefix of the whole.  Marks cover what is
    # left of such a turn; without marks none of it is learned, see test_thoughts.py: here it has no thoughts.
    "rewrites earlier turns": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<a>' }}{% generation %}"
        "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ '<u>' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
    ),
    # The whole starts with a count of turns: nothing is a prefix.
    "header counts turns": (
        "{{ messages | length }}{{ ' turns\n' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<a>' }}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ '<u>' + m['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
    ),
    # Parts of a conversation are refused.
    "refuses parts": (
        "{% if messages | length != 5 %}{{ raise_exception('five turns only') }}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ '<a>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ '<u>' + m['content'] }}{% endif %}{% endfor %}"
    ),
}
CHAT = [
    {"role": "system", "content": "Short answers."},
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "<think>easy</think>Paris, of course: Paris."},
    {"role": "user", "content": "And of the U.K.?"},
    {"role": "assistant", "content": "London. 日本 é"},
]


def _chat(name: str) -> list[dict[str, str]]:
    said = [m for m in CHAT if name != "llama2" or m["role"] != "system"]
    if name == "rewrites earlier turns":
        said = [{**m, "content": m["content"].removeprefix("<think>easy</think>")} for m in said]
    return said


def _with_template(tokenizer, template: str):
    clone = copy.copy(tokenizer)
    clone.chat_template = template
    return clone


def _unmarked(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module", params=["models/stories3m-llama", "tokenizers/minimind-6400", "tokenizers/gpt2"])
def some_tokenizer(request, tokenizer_of):
    return tokenizer_of(request.param)


@pytest.mark.parametrize("name", MARKED)
def test_trap_masks_without_generation_marks_are_those_with_marks(name, some_tokenizer):
    chat = _chat(name)
    marked = ChatTemplate(_with_template(some_tokenizer, MARKED[name])).conversation(chat)
    plain = ChatTemplate(_with_template(some_tokenizer, _unmarked(MARKED[name]))).conversation(chat)
    assert plain == marked
    assert len(plain.spans) == 2
    assert [plain.text[a:b].strip().startswith(w) for (a, b), w in zip(plain.spans, ("", "London"), strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("name", [n for n in MARKED if n != "refuses parts"])
def test_tokens_and_masks_are_those_of_apply_chat_template(name, some_tokenizer):
    chat = _chat(name)
    tokenizer = _with_template(some_tokenizer, MARKED[name])
    want = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = np.array(want["input_ids"]), np.array(want["assistant_masks"], bool)
    encoder = Encoder(_with_template(some_tokenizer, _unmarked(MARKED[name])))
    record = Record(0, "x", 1, "messages", messages=chat)
    (got,) = tokenize_records([record], encoder, append_eos=False)
    tokens = np.concatenate([got.prompt, got.completions[0]])
    scored = np.concatenate([np.zeros(len(got.prompt), bool), got.masks[0]])
    skip = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id  # a second BOS goes
    ids, mask = ids[int(skip) :], mask[int(skip) :]
    np.testing.assert_array_equal(tokens, ids[: len(tokens)])
    # Marks may cover white space behind the end of a turn, which is never generated.
    extra = np.flatnonzero(mask[: len(tokens)] & ~scored)
    assert all(not tokenizer.decode([t]).strip() for t in tokens[extra])
    missing = np.flatnonzero(scored & ~mask[: len(tokens)])
    assert not len(missing), tokenizer.convert_ids_to_tokens(tokens[missing])
    assert got.masks[0][0] and got.masks[0][-1]  # the prompt ends where the assistant begins
    assert tokenizer.decode(tokens[scored]).count("London") == 1


def test_trap_an_earlier_turn_in_other_words_is_learned_only_by_marks(some_tokenizer):
    marked = MARKED["rewrites earlier turns"]
    for source, want in ((marked, 2), (_unmarked(marked), 1)):
        rendered = ChatTemplate(_with_template(some_tokenizer, source)).conversation(CHAT)
        assert [rendered.text[a:b].removesuffix(some_tokenizer.eos_token) for a, b in rendered.spans] == [
            "Paris, of course: Paris.", "London. 日本 é",
        ][-want:]  # fmt: skip
        assert rendered.rewritten == (() if want == 2 else (2,))


@pytest.mark.parametrize("name", ["tokenizers/minimind-6400", "tokenizers/qwen2-rebuilt"])
def test_trap_real_templates_without_marks_have_masks(name, tokenizer_of):
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer)
    assert "generation %}" not in tokenizer.chat_template
    record = Record(0, "x", 1, "messages", messages=CHAT)
    (got,) = tokenize_records([record], encoder, append_eos=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    tokens = np.concatenate([got.prompt, got.completions[0]]).tolist()
    assert tokens == whole[: len(tokens)]
    assert not tokenizer.decode(whole[len(tokens) :]).strip()
    scored = [tokenizer.decode(run) for run in _runs(got.completions[0], got.masks[0])]
    assert scored[0].endswith("Paris, of course: Paris.<|im_end|>")
    assert scored[1] in ("London. 日本 é<|im_end|>", "London. 日本 é<|im_end|>\n")
    assert got.complete == (True,)
    assert tokenizer.decode(got.prompt).endswith("<|im_start|>assistant\n" if "qwen" in name else "<think>\n")


def _runs(tokens, mask):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokens[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_trap_nothing_behind_the_end_of_a_turn_is_scored(tokenizer_of):
    """A template that opens an answer whether it is asked to or not: neither that nor the next turn is scored."""
    template = _unmarked(MARKED["chatml"]).replace("{% if add_generation_prompt %}", "{% if true %}")
    chat = [*CHAT, {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "a<|im_end|>b"}]
    for name in ("tokenizers/minimind-6400", "tokenizers/qwen2-rebuilt"):
        encoder = Encoder(_with_template(tokenizer_of(name), template))
        (got,) = tokenize_records([Record(0, "x", 1, "messages", messages=chat)], encoder, append_eos=True)
        scored = [encoder.tokenizer.decode(run) for run in _runs(got.completions[0], got.masks[0])]
        assert scored == [f"{m['content']}<|im_end|>" for m in chat if m["role"] == "assistant"]
        assert got.complete == (True,)
        sides = [chat[2:3], [{"role": "assistant", "content": "Rome"}]]
        pair = Record(0, "x", 1, "pair", prompt=chat[:2], chosen=sides[0], rejected=sides[1])
        (got,) = tokenize_records([pair], encoder, append_eos=True)
        assert [encoder.tokenizer.decode(c) for c in got.completions] == [f"{s[0]['content']}<|im_end|>" for s in sides]


def test_generation_marks_without_the_end_of_turn_gain_its_eos(tokenizer_of):
    template = MARKED["default system"].replace(
        " + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}"
    )
    tokenizer = _with_template(tokenizer_of("models/stories3m-llama"), template)
    rendered = ChatTemplate(tokenizer).conversation(CHAT)
    assert all(rendered.text[a:b].endswith("</s>") for a, b in rendered.spans)


def test_messages_of_weight_zero_are_not_scored(tokenizer_of):
    chat = [dict(m) for m in CHAT]
    chat[2]["weight"] = 0
    for template in (MARKED["chatml"], _unmarked(MARKED["chatml"])):
        rendered = ChatTemplate(_with_template(tokenizer_of("tokenizers/gpt2"), template)).conversation(chat)
        assert [rendered.text[a:b] for a, b in rendered.spans] == ["London. 日本 é<|im_end|>\n"]


def test_tools_reach_the_template(tokenizer_of):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    record = Record(0, "x", 1, "messages", messages=CHAT, columns={"tools": str(tools).replace("'", '"')})
    encoder = Encoder(tokenizer_of("tokenizers/minimind-6400"))
    (got,) = tokenize_records([record], encoder, append_eos=True)
    assert "clock" in encoder.tokenizer.decode(got.prompt)


def test_trap_tool_calls_that_no_template_renders_are_an_error(tokenizer_of):
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    chat = [*CHAT[1:2], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    record = Record(3, "x", 4, "messages", messages=[*chat, CHAT[4]])
    encoder = Encoder(tokenizer_of("tokenizers/minimind-6400"))
    (got,) = tokenize_records([record], encoder, append_eos=True)
    assert '"name": "clock"' in encoder.tokenizer.decode(got.completions[0][got.masks[0]])
    for without in (
        Encoder(tokenizer_of("tokenizers/qwen2-rebuilt")),
        Encoder(tokenizer_of("models/stories3m-llama"), (), render_plain),
    ):
        with pytest.raises(InputError, match=r"record 3 .* tool call 'clock' of message 1 is not in the rendered text"):
            list(tokenize_records([record], without, append_eos=True))


def test_a_refused_conversation_names_the_record(tokenizer_of):
    tokenizer = _with_template(tokenizer_of("tokenizers/gpt2"), "{{ raise_exception('roles must alternate') }}")
    record = Record(7, "chats.jsonl", 8, "messages", messages=CHAT)
    with pytest.raises(InputError, match=r"record 7 \(line 8 of chats.jsonl\).*roles must alternate"):
        list(tokenize_records([record], Encoder(tokenizer), append_eos=False))


def test_a_template_that_leaves_the_assistant_out_is_an_error(tokenizer_of):
    template = "{{ messages | length }}{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out message 2"):
        ChatTemplate(_with_template(tokenizer_of("tokenizers/gpt2"), template)).conversation(CHAT)


def test_messages_without_any_template_are_an_error(tokenizer_of):
    with pytest.raises(InputError, match="no chat template"):
        ChatTemplate(tokenizer_of("tokenizers/gpt2")).conversation(CHAT)


@pytest.mark.parametrize("a, b", [("", ""), ("abc", "abd"), ("abc", "abc"), ("abc", "abcd"), ("x", "y")])
def test_common_prefix(a, b):
    want = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))
    assert common_prefix(a, b) == common_prefix(list(a), list(b)) == want

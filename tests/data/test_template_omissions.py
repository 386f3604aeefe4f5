"""What a chat template leaves out, refuses or splits: counted, and told before training."""

import copy
import json

import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data.build import from_records
from jaxalign.data.dialogues import as_messages, render_plain
from jaxalign.data.mixture import load_records
from jaxalign.data.records import Notes, Record
from jaxalign.data.report import as_text
from jaxalign.data.template import ChatTemplate
from jaxalign.data.tokenize import LOST, Encoder, tokenize_records
from jaxalign.errors import InputError
from jaxalign.registry import COMPLETIONS

# In the manner of Mistral-7B-Instruct-v0.1: a system turn is written before a first user turn only if it is the last.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ '[INST] ' + messages[0]['content'] + '\n\n' }}"
    "{% else %}{{ '[INST] ' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# In the manner of Qwen2.5: tools in a system turn, calls in tags.
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\nAnswer in <tool_call></tool_call>. Tools:\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
S, U, A = ({"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")))
CHAT = [S, U, A, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def with_template(tokenizer, template):
    clone = copy.copy(tokenizer)
    clone.chat_template = template
    return clone


@pytest.fixture(scope="module")
def qwen(tokenizer_of):
    return tokenizer_of("tokenizers/qwen2-rebuilt")


def lost(tokenizer, records, plain=None):
    notes = Notes()
    list(tokenize_records(records, Encoder(tokenizer, (), plain), append_eos=False, notes=notes))
    return {name.removeprefix(LOST): n for name, n in notes.items()}


def chat(messages, index=0, **columns):
    return Record(index, "x.json", index + 1, "messages", messages=messages, columns=columns)


def test_a_system_turn_that_a_template_drops_is_counted(qwen, tokenizer_of):
    mistral = with_template(qwen, MISTRAL)
    assert lost(mistral, [chat(CHAT), chat(CHAT[1:], 1)]) == {"system turns": 1}
    assert lost(mistral, [Record(0, "x", 1, "prompt", prompt=[S, U])]) == {}
    pair = Record(0, "x", 1, "pair", prompt=[S, U], chosen=[A], rejected=[CHAT[4]])
    assert lost(mistral, [pair], "dpo") == {"system turns": 1}
    for name in ("qwen2-rebuilt", "minimind-6400"):
        assert lost(tokenizer_of(f"tokenizers/{name}"), [chat(CHAT)]) == {}


@pytest.mark.parametrize(
    ("template", "messages", "want"),
    [
        ("{% for m in messages if m.role != 'tool' %}[{{ m.content }}]{% endfor %}", "tool", {"tool turns": 1}),
        ("{% for m in messages %}[{{ m.content | tojson }}]{% endfor %}", "tool", {}),
        ("{% for m in messages %}[{{ m.content | upper | lower | trim }}]{% endfor %}", "lower", {}),
        ("{% for m in messages %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}", "think", {"reasoning": 1}),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "reasoning", {"reasoning": 1}),
        ("{% for m in messages %}[{{ m.reasoning_content or '' }}{{ m.content }}]{% endfor %}", "reasoning", {}),
    ],
)
def test_what_else_may_be_lost(qwen, template, messages, want):
    said = {
        "tool": [U, A, {"role": "tool", "content": '{"a":\n "é"}'}, CHAT[4]],
        "lower": [{"role": "user", "content": " hi\n there "}, {"role": "assistant", "content": "yes "}],
        "think": [U, {"role": "assistant", "content": "<think>Hm.</think>\nYes"}, CHAT[3], CHAT[4]],
        "reasoning": [U, {**A, "reasoning_content": "Because."}],
    }[messages]
    assert lost(with_template(qwen, template), [chat(said)]) == want


def test_a_refused_system_turn_can_be_folded_or_dropped(qwen, tmp_path):
    gemma = with_template(qwen, GEMMA)
    with pytest.raises(InputError, match="System role not supported") as error:
        lost(gemma, [chat(CHAT)])
    assert "data.system_turns=fold" in error.value.fix and "drop" in error.value.fix
    with pytest.raises(InputError) as error:
        lost(gemma, [chat([A, *CHAT[1:]])])
    assert "system_turns" not in error.value.fix, "it would not help"

    def text(how, records):
        config = defaults("sft")
        config.workdir, config.data.packing, config.data.system_turns = str(tmp_path), False, how
        dataset = from_records(records, config, gemma)
        example = dataset.example(0)
        return qwen.decode(np.concatenate([example.prompt, example.completions[0]]))

    assert "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>" in text("fold", [chat(CHAT)])
    assert "<start_of_turn>user\nHi<end_of_turn>" in text("drop", [chat(CHAT)])
    record = Record(0, "x", 1, "completion", prompt=[S, U], completion=[A])
    assert "Be brief.\n\nHi" in text("fold", [record])


def test_tools_that_a_template_ignores_are_counted_on_real_dialogues(shared, qwen, tokenizer_of):
    records, _ = load_records(str(shared / "data/llamafactory-demo/glaive_toolcall_en_demo.json"), COMPLETIONS)
    found = lost(qwen, records)
    assert found["tools"] == sum(bool(json.loads(r.columns["tools"])) for r in records if r.columns["tools"]) == 191
    calls = sum(any("function_call" in m for m in r.messages) for r in records)
    assert found["the tags of function calls (written as their JSON)"] == calls > 100
    assert lost(tokenizer_of("tokenizers/minimind-6400"), records) == {}
    assert lost(with_template(qwen, HERMES), records) == {}
    assert lost(tokenizer_of("tokenizers/gpt2"), records, plain=render_plain) == {"tools": 191}


def test_sharegpt_function_calls_are_written_in_the_tags_that_a_template_has(qwen, tokenizer_of):
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    turns = [("human", "Time?"), ("function_call", json.dumps(call)), ("observation", "4"), ("gpt", "Four.")]
    messages = as_messages([{"from": role, "value": value} for role, value in turns])
    for tokenizer in (with_template(qwen, HERMES), tokenizer_of("tokenizers/minimind-6400")):
        (example,) = tokenize_records([chat(messages)], Encoder(tokenizer), append_eos=False)
        said = tokenizer.decode(example.completions[0][example.masks[0]])
        assert "<tool_call>" in said and '"clock"' in said and said.count("clock") == 1
    (example,) = tokenize_records([chat(messages)], Encoder(qwen), append_eos=False)
    assert json.dumps(call) in qwen.decode(example.completions[0][example.masks[0]])
    strange = as_messages([{"from": "function_call", "value": "no JSON"}])
    assert strange == [{"role": "assistant", "content": "no JSON"}]


def test_a_template_that_refuses_calls_gets_their_json(qwen):
    refuses = "{% if messages[1].tool_calls %}{{ raise_exception('ids') }}{% endif %}" + HERMES
    messages = as_messages([{"from": "human", "value": "Q"}, {"from": "function_call", "value": '{"name": "f"}'}])
    tokenizer = with_template(qwen, refuses)
    (example,) = tokenize_records([chat(messages)], Encoder(tokenizer), append_eos=False)
    assert '{"name": "f"}' in qwen.decode(example.completions[0])
    assert list(lost(tokenizer, [chat(messages)])) == ["the tags of function calls (written as their JSON)"]


def test_tools_that_are_no_schemas_are_counted(tokenizer_of):
    for tools, want in (("[{broken", 1), ("[]", 0), ("", 0), (None, 0), ("[]", 0), (["clock"], 1)):
        assert sum(lost(tokenizer_of("tokenizers/minimind-6400"), [chat(CHAT, tools=tools)]).values()) == want


def test_markers_that_are_several_tokens_are_named(tokenizer_of, qwen):
    neox = with_template(tokenizer_of("tokenizers/gpt-neox-20b"), LLAMA3)
    assert set(ChatTemplate(neox).split_markers()) == {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    assert min(ChatTemplate(neox).split_markers().values()) > 1
    assert ChatTemplate(with_template(qwen, GEMMA)).split_markers().keys() == {"<start_of_turn>", "<end_of_turn>"}
    for name in ("tokenizers/qwen2-rebuilt", "tokenizers/minimind-6400", "tokenizers/gpt2"):
        assert ChatTemplate(tokenizer_of(name)).split_markers() == {}


def test_the_report_tells_what_is_lost_and_split(tokenizer_of, tmp_path):
    config = defaults("sft")
    config.workdir, config.data.packing = str(tmp_path), False
    tokenizer = with_template(tokenizer_of("tokenizers/gpt-neox-20b"), LLAMA3.replace("messages %}", "messages[1:] %}"))
    for _ in range(2):  # from records, and from the cache
        report = from_records([chat(CHAT, i) for i in range(4)], config, tokenizer).report
        assert report["lost"] == {"system turns": 4}
        (left,) = (w for w in report["warnings"] if "left out by the chat template" in w)
        assert "x.json:1" in left and "data.system_turns=fold" in left and "x.json:1" in as_text(report)
        (split,) = (w for w in report["warnings"] if "<|eot_id|>" in w)
        assert "chat_template" in split


def test_a_record_that_a_template_refuses_can_be_skipped(qwen, tmp_path):
    gemma, config = with_template(qwen, GEMMA), defaults("sft")
    config.workdir, config.data.packing = str(tmp_path), False
    records = [chat([U, A] if i % 10 else CHAT, i) for i in range(30)]
    with pytest.raises(InputError, match=r"line 1 of x\.json"):
        from_records(records, config, gemma)
    config.data.on_error = "skip"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match="3 of 30 rows are wrong"):
            from_records(records, config, gemma)
    config.data.max_skipped = 0.1
    dataset = from_records(records, config, gemma)
    assert dataset.num_records == 27
    (reason,) = dataset.report["records"]["skipped"]
    assert "System role not supported" in reason and "x.json:1, :11" in as_text(dataset.report)

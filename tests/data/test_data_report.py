"""The report on data, and rows as text."""

import json

import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data.build import from_records
from jaxalign.data.records import Record
from jaxalign.data.report import as_text
from tests.data.row_texts import row_texts

TOKENIZER = "models/stories3m-llama"


@pytest.fixture
def build(tmp_path, tokenizer_of):
    def _build(purpose, records, split="train", like=None, tally=None, **data):
        config = defaults(purpose)
        config.workdir, config.batch_size = str(tmp_path), 4
        config.data.update({"packing": False, **data})
        tokenizer = tokenizer_of(TOKENIZER)
        return from_records(records, config, tokenizer, split, like=like, tally=tally)

    return _build


def _pairs(triples):
    return [Record(i, "s", i + 1, "pair", prompt=p, chosen=c, rejected=r) for i, (p, c, r) in enumerate(triples)]


def test_messages_without_a_chat_template_are_said_once(build, tokenizer_of):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    records = [Record(i, "s", i + 1, "messages", messages=turns) for i in range(3)]
    assert tokenizer_of(TOKENIZER).chat_template is None
    train = build("sft", records)
    assert train.report["plain_dialogues"] == 3
    (said,) = (w for w in train.report["warnings"] if "config.model.chat_template" in w)
    assert said.startswith("records of messages: 3;") and r"\n\nHuman: ... \n\nAssistant: ..." in said
    held_out = build("sft", records, split="eval", like=train, eval_sources=("x",))
    assert not any("chat_template" in w for w in held_out.report["warnings"])
    strings = [Record(0, "s", 1, "completion", prompt="Q", completion="A")]
    assert build("sft", strings).report["plain_dialogues"] == 0


def test_messages_with_a_chat_template_are_as_they_should_be(build, tokenizer_of, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer_of(TOKENIZER), "chat_template", template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    report = build("sft", [Record(0, "s", 1, "messages", messages=turns)]).report
    assert report["plain_dialogues"] == 0 and not any("chat_template" in w for w in report["warnings"])


def test_every_figure_of_a_small_set(build):
    pairs = _pairs(
        [("Q one:", " yes yes yes", " no"), ("Q one:", " yes", " no"), ("Q one:", " yes", " no"), ("Q:", " a", " a")]
    )
    tally = {"read": 5, "dropped": {"null column": 1}, "examples": {"null column": ["s:9"]}, "sources": []}
    report = build("dpo", pairs, tally=tally).report
    assert json.loads(json.dumps(report)) == report
    assert report["records"]["read"] == 5 and report["records"]["used"] == 3
    assert report["records"]["dropped"] == {"null column": 1, "chosen equals rejected": 1}
    assert report["pairs"]["equal"] == 1
    assert report["duplicates"] == {"records": 1, "prompts": 2}
    assert report["tokens"]["completion"] == report["tokens"]["scored"]
    lengths = report["lengths"]
    assert lengths["chosen"]["max"] - lengths["chosen"]["min"] == 2 and lengths["rejected"]["p50"] == 2
    assert lengths["prompt"]["min"] == lengths["prompt"]["max"] == report["tokens"]["prompt"] / 3
    assert report["pairs"]["chosen_longer"] == pytest.approx(1 / 3, abs=1e-4)
    assert report["pairs"]["length_gap"] == pytest.approx(2 / 3, abs=1e-4)
    rows = report["rows"]
    used = report["tokens"]["prompt"] + report["tokens"]["completion"]
    assert rows["padding_share"] == pytest.approx(1 - used / (4 * rows["length"]), abs=1e-6)
    assert report["finished_share"] == 1.0
    assert report["guides"] == {
        "pairs": 3,
        "style": [5000, 10000],
        "facts": [30000, 100000],
        "production": [10000, 50000],
    }
    text = as_text(report)
    assert "null column 1" in text and "3 pairs; guides call for 5,000" in text


def test_trap_truncation_is_in_the_report(build):
    pairs = _pairs([(f"Tell me the number {i} and more", " one two three four five six", " no") for i in range(4)])
    cut = build("dpo", pairs, truncation="keep_end", max_prompt_length=4, max_completion_length=3).report
    assert cut["truncated"] == {"prompts": 4, "completions": 4}
    assert any("truncated" in w for w in cut["warnings"]) and cut["finished_share"] == 0.5
    assert build("dpo", pairs).report["truncated"] == {"prompts": 0, "completions": 0}


def test_signs_of_bias_are_seen(build):
    words = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree", "lake", "bird"]
    pick = lambda i, n: " ".join(words[(i * 7 + j * 3) % 10] for j in range(n))  # noqa: E731
    fair = build("dpo", _pairs([(f"{i}:", " " + pick(i, 5), " " + pick(i + 1, 5)) for i in range(60)])).report
    assert len(fair["warnings"]) == 1 and "pairs; guides" in fair["warnings"][0]
    long = build("dpo", _pairs([(f"{i}:", " " + pick(i, 9), " " + pick(i + 1, 4)) for i in range(60)])).report
    assert any("chosen completion is the longer one" in w for w in long["warnings"])
    echo = build("dpo", _pairs([(pick(i, 3) + ":", " " + pick(i, 3), " big 12 hot") for i in range(60)])).report
    assert echo["pairs"]["echo"]["chosen"] > 2 * echo["pairs"]["echo"]["rejected"]
    assert any("echo the prompt" in w for w in echo["warnings"])
    hedged = build(
        "dpo", _pairs([(f"{i}:", " " + pick(i, 5), " perhaps maybe " + pick(i, 3)) for i in range(60)])
    ).report
    assert any("hedging words" in w for w in hedged["warnings"])
    narrow = build(
        "dpo", _pairs([(f"{i}:", f" {pick(i, 4)} {i} {pick(i + 2, 2)}", " I cannot help with that") for i in range(60)])
    ).report
    assert any("narrow region" in w for w in narrow["warnings"])


def test_overlap_of_training_and_evaluation_is_counted(build):
    texts = [Record(i, "s", i + 1, "text", text=f"story {i}") for i in range(6)]
    train = build("sft", texts[:4])
    held = build("sft", [r._replace(index=i) for i, r in enumerate(texts[2:])], split="eval", like=train)
    assert held.report["overlap"] == {"prompts": 2, "records": 2}
    assert any("prompts that training has too" in w for w in held.report["warnings"])
    assert "overlap" not in train.report


@pytest.mark.parametrize("purpose", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("options", [{"packing": True}, {"packing": False}, {"packing": True, "shared_prompt": False}])
def test_rows_are_shown_with_what_is_scored(build, tokenizer_of, purpose, options):
    if purpose == "sft":
        options.pop("shared_prompt", None)
    pairs = _pairs([(f"Say {i}:", f" yes {i}", f" no {i} no") for i in range(5)])
    if purpose == "sft":
        pairs = [pair._replace(form="completion", completion=pair.chosen) for pair in pairs]
    dataset = build(purpose, pairs, **options)
    batch = dataset.batch(0)
    shown = {text for row in range(4) for text in row_texts(batch, row, tokenizer_of(TOKENIZER))}
    want = set()
    for i in range(dataset.num_records):
        for completion in dataset.example(i).completions:
            prompt, said = (tokenizer_of(TOKENIZER).decode(a) for a in (dataset.example(i).prompt, completion))
            whole = tokenizer_of(TOKENIZER).decode(np.concatenate([dataset.example(i).prompt, completion]))
            want.add(whole + "⟨score⟩" if purpose == "reward" else f"{prompt}⟦{said}⟧")
    assert shown <= want and (shown == want or not options["packing"])


def test_prompts_and_partly_scored_rows_are_shown(build, tokenizer_of):
    tokenizer = tokenizer_of(TOKENIZER)
    dataset = build("ppo", [Record(0, "s", 1, "prompt", prompt="Once upon")])
    assert row_texts(dataset.batch(0), 0, tokenizer) == ["<s> Once upon"]
    chat = [
        {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "So"), ("user", "Ho"), ("assistant", "No"))
    ]
    shown = row_texts(build("sft", [Record(0, "s", 1, "messages", messages=chat)]).batch(0), 0, tokenizer)
    assert len(shown) == 1 and shown[0].count("⟦") == 2
    assert [part.split("⟧")[0].strip() for part in shown[0].split("⟦")[1:]] == ["So", "No</s>"]


def test_rows_that_hold_nothing_are_told_however_few(build):
    pairs = _pairs([(f"Q {i}:", " yes", " no") for i in range(99)])
    tally = {"read": 100, "dropped": {"rejected is null": 1}, "examples": {"rejected is null": ["d.jsonl:9"]}}
    (said,) = (w for w in build("dpo", pairs, tally=tally).report["warnings"] if "null" in w)
    assert said.startswith("1 ") and "d.jsonl:9" in said

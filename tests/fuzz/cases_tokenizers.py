"""Tokenizers and chat templates that are broken, or that do not belong to the model."""

from __future__ import annotations

import json
import random

from tests.fuzz.case import REFUSED, SOUND, Case
from tests.fuzz.cases_models import changed, copied, model_case
from tests.fuzz.world import train


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `tokenizer`."""
    return [*_tokenizers(), *_templates()]


def _tokenizers():
    def tokenizer(**fields):
        return lambda m: changed(m / "tokenizer.json", **fields)

    def settings(**fields):
        return lambda m: changed(m / "tokenizer_config.json", **fields)

    def vocabulary(change):
        def edited(m):
            value = json.loads((m / "tokenizer.json").read_text())
            change(value)
            (m / "tokenizer.json").write_text(json.dumps(value))

        return edited

    def more(value, count=200):
        value["added_tokens"] += [
            dict(value["added_tokens"][0], id=600 + i, content=f"<extra{i}>") for i in range(count)
        ]

    changes = {
        "too-many-ids": (vocabulary(more), REFUSED, ("<extra",)),
        "model-null": (tokenizer(model=None), REFUSED, ("tokenizer",)),
        "model-unknown": (tokenizer(model={"type": "Mystery"}), REFUSED, ("tokenizer",)),
        "vocabulary-empty": (vocabulary(lambda v: v["model"].update(vocab={}, merges=[])), SOUND, ()),
        "added-null": (tokenizer(added_tokens=None), REFUSED, ("tokenizer",)),
        "added-number": (tokenizer(added_tokens=[3]), REFUSED, ("tokenizer",)),
        "version-unknown": (tokenizer(version="9.0"), SOUND, ()),
        "no-eos": (settings(eos_token=None), SOUND, ()),
        "no-tokens": (settings(eos_token=None, bos_token=None, pad_token=None, unk_token=None), SOUND, ()),
        "eos-unknown": (settings(eos_token="<nowhere>"), SOUND, ()),
        "pad-unknown": (settings(pad_token="<nowhere>"), SOUND, ()),
        "eos-number": (settings(eos_token=3), REFUSED, ()),
        "eos-list": (settings(eos_token=["</s>"]), REFUSED, ()),
        "eos-object": (settings(eos_token={"content": 3}), REFUSED, ()),
        "pad-is-eos": (settings(pad_token="</s>"), SOUND, ()),
        "class-unknown": (settings(tokenizer_class="Mystery"), SOUND, ()),
        "class-number": (settings(tokenizer_class=3), SOUND, ()),
        "class-of-another": (settings(tokenizer_class="BertTokenizer"), SOUND, ()),
        "remote-code": (settings(auto_map={"AutoTokenizer": ["evil.Tok", None]}), SOUND, ()),
        "length-text": (settings(model_max_length="x"), SOUND, ()),
        "length-2": (settings(model_max_length=2), SOUND, ()),
    }
    for name, (change, expect, words) in changes.items():
        for how, kind in ((0.0, "generate"), (0.9, "train")):
            yield model_case("tokenizer", f"{name}-{kind}", change, expect, words, how)

    def dry(name, algorithm, *lines):
        def make(place):
            m = copied(place)
            vocabulary(more)(m)
            return train(place, algorithm, "c.model.tokenizer = 'm'", *lines, dry=True)

        return Case("tokenizer", name, make, REFUSED, ("<extra",))

    for algorithm in ("sft", "dpo", "reward", "ppo"):
        yield dry(f"too-many-ids-{algorithm}", algorithm)
        yield dry(f"too-many-ids-scratch-{algorithm}", algorithm, "c.model.from_scratch = True")
    for name, data in {"empty": b"", "random": random.Random(1).randbytes(2000), "text": b"hello"}.items():

        def change(m, data=data):
            (m / "tokenizer.json").unlink()
            (m / "tokenizer.model").write_bytes(data)

        yield model_case("tokenizer", f"sentencepiece-{name}", change, REFUSED, ("tokenizer.model",))


def _templates():
    templates = {
        "syntax": ("{% for m in messages %}", REFUSED),
        "unknown-tag": ("{% mystery %}", REFUSED),
        "unclosed": ("{{ messages", REFUSED),
        "undefined": ("{{ nothing.at.all }}", REFUSED),
        "raises": ("{{ raise_exception('no') }}", REFUSED),
        "division": ("{{ 1 / 0 }}", REFUSED),
        "empty-output": ("{{ '' }}", REFUSED),
        "constant": ("{{ 'hello' }}", REFUSED),
        "endless": ("{% for i in range(10 ** 9) %}x{% endfor %}", REFUSED),
        "import": ("{% include 'x' %}", REFUSED),
        "class": ("{{ ''.__class__.__mro__ }}", REFUSED),
        "nowhere": ("no/such/file.jinja", REFUSED),
        "blank": (" ", REFUSED),
        "drops-answers": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", REFUSED),
        "drops-users": ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", SOUND),
        "backwards": ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", SOUND),
        "changes-text": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", SOUND),
        "of-the-clock": ("{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}{% endfor %}", SOUND),
    }
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    for name, (template, expect) in templates.items():
        for used in (True, False):

            def make(place, template=template, used=used):
                (place.here / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
                lines = ["c.data.sources = ('x.jsonl',)"] * used
                return train(place, "sft", f"c.model.chat_template = {template!r}", *lines, dry=True)

            bad_anyway = name in ("syntax", "unknown-tag", "unclosed", "nowhere", "blank")
            softer = expect if used or bad_anyway else SOUND
            limit = 60.0
            yield Case("tokenizer", f"template-{name}{'' if used else '-unused'}", make, softer, limit=limit)
    reads = "{% for m in messages %}{{ m.content }}{% endfor %}{{ think | default(0) }}"
    values = {
        "unknown": ('({"thinks": 1},)', REFUSED),
        "given": ('({"messages": 1},)', REFUSED),
        "no-pair": ('("think",)', REFUSED),
        "no-name": ('({"": 1},)', REFUSED),
        "nan": ('({"think": float("nan")},)', REFUSED),
        "object": ('({"think": object()},)', REFUSED),
        "surrogate": (r'({"think": "\ud800"},)', REFUSED),
        "dict": ('{"think": 1}', REFUSED),
        "code": ('({"think": "{% endfor %}{{ 1 / 0 }}"},)', SOUND),
        "deep": ('({"think": [[[[[[[[[[{}]]]]]]]]]]},)', SOUND),
    }
    for name, (value, expect) in values.items():

        def make(place, value=value):
            (place.here / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            lines = "c.data.sources = ('x.jsonl',)", f"c.data.chat_template_kwargs = {value}"
            return train(place, "sft", f"c.model.chat_template = {reads!r}", *lines, dry=True)

        yield Case("tokenizer", f"kwargs-{name}", make, expect)
    for name, data in {"binary": bytes(range(256)), "utf-16": "{{ messages }}".encode("utf-16")}.items():

        def make(place, data=data):
            (place.here / "t.jinja").write_bytes(data)
            return train(place, "sft", "c.model.chat_template = 't.jinja'", dry=True)

        yield Case("tokenizer", f"template-file-{name}", make, REFUSED, ("t.jinja",))
    own = {"chat_template": 3}, {"chat_template": []}, {"chat_template": {"a": 1}}, {"chat_template": "{% for"}
    for number, fields in enumerate(own):

        def make(place, fields=fields):
            changed(copied(place) / "tokenizer_config.json", **fields)
            (place.here / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            return train(place, "sft", "c.model.path = 'm'", "c.data.sources = ('x.jsonl',)", dry=True)

        yield Case("tokenizer", f"template-own-{number}", make, SOUND if number in (1, 2) else REFUSED)

"""Records that are wrong: columns missing or of another type, pairs that are none, messages in every wrong shape."""

from __future__ import annotations

import json
import random

from tests.fuzz.case import REFUSED, RUNS, SOUND, WARNS, Case
from tests.fuzz.cases_datafiles import good_rows
from tests.fuzz.world import train

COLUMNS = {
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
    "ppo": ("prompt",),
}
GONE = object()
RAW = "\x00raw\x00"  # marks JSON that is written as it stands


def cases(rng: random.Random) -> list[Case]:
    """The cases of the groups `data` and `messages`."""
    return [*_values(rng), *_rows(rng), *_pairs(), *_messages(rng), *_numbers(), *_labels(), *_whole_sets()]


def _write(place, rows, name="x.jsonl") -> None:
    lines = []
    for row in rows:
        line = row if isinstance(row, str) else json.dumps(row)
        while RAW in line or json.dumps(RAW)[1:-1] in line:
            before, _, rest = line.partition('"' + json.dumps(RAW)[1:-1])
            raw, _, after = rest.partition('"')
            line = before + raw + after
        lines.append(line + "\n")
    (place.here / name).write_bytes("".join(lines).encode("utf-8", "surrogatepass"))


def _case(group, name, algorithm, change, expect=REFUSED, words=(), lines=(), dry=True):
    """A run on the good records as `change` makes them."""

    def make(place):
        _write(place, change(good_rows(place.world, algorithm)))
        return train(place, algorithm, "c.data.sources = ('x.jsonl',)", *lines, dry=dry)

    return Case(group, name, make, expect, words)


def _values(rng):
    """A column at a value of the wrong type: in every record, and in one."""
    values = {
        "gone": GONE,
        "null": None,
        "number": 3,
        "float": 2.5,
        "nan": float("nan"),
        "true": True,
        "list": ["a"],
        "numbers": [1, 2],
        "object": {"a": 1},
        "nested": [[["a"]]],
        "empty-list": [],
        "empty-object": {},
        "empty": "",
        "blank": " \n\t ",
        "digits": RAW + "9" * 5000,
        "infinity": RAW + "Infinity",
        "bare-word": RAW + "undefined",
    }
    for algorithm, columns in COLUMNS.items():
        for column in columns:
            for name, value in values.items():
                for scope in ("all", "one"):
                    if scope == "one" and rng.random() < 0.5:
                        continue

                    def change(rows, column=column, value=value, scope=scope):
                        for number, row in enumerate(rows):
                            if scope == "all" or number == 30 % len(rows):
                                row[column] = value
                                if value is GONE:
                                    del row[column]
                        return rows

                    soft = name in ("null", "empty", "blank", "empty-list")
                    expect = SOUND if soft else REFUSED
                    if scope == "all" and column != "prompt":
                        expect = REFUSED
                    if scope == "all" and algorithm == "ppo":
                        expect = REFUSED
                    if scope == "one" and column == "prompt" and name == "gone" and algorithm != "ppo":
                        expect = SOUND
                    words = ("x.jsonl",) if expect == REFUSED else ()
                    yield _case("data", f"{algorithm}-{column}-{name}-{scope}", algorithm, change, expect, words)


def _rows(rng):
    """Lines that are no records, and texts that are no texts."""
    lines = {
        "list": ("[1]", REFUSED),
        "text": ('"abc"', REFUSED),
        "number": ("3", REFUSED),
        "null": ("null", REFUSED),
        "word": ("hello", REFUSED),
        "cut": ('{"prompt": "a', REFUSED),
        "two-objects": ('{"prompt": "a"} {"prompt": "b"}', REFUSED),
        "single-quotes": ("{'prompt': 'a'}", REFUSED),
        "empty-object": ("{}", REFUSED),
        "deep": ("[" * 50_000 + "]" * 50_000, REFUSED),
        "deep-column": ('{"prompt": "a", "x": ' + '{"a":' * 3000 + "1" + "}" * 3001, SOUND),
        "comment": ("# a comment", REFUSED),
        "bom-within": ("\ufeff{}", REFUSED),
        "control": ('{"prompt": "a\x01b"}', REFUSED),
        "bad-escape": ('{"prompt": "\\x"}', REFUSED),
    }
    for name, (line, expect) in lines.items():
        for at in (0, 20):
            algorithm = rng.choice(tuple(COLUMNS))
            yield _case(
                "data",
                f"line-{name}-at-{at}-{algorithm}",
                algorithm,
                lambda rows, at=at, line=line: [*rows[:at], line, *rows[at:]],
                expect,
                (f"x.jsonl:{at + 1}|x.jsonl:",) if expect == REFUSED else (),
            )
    texts = {
        "surrogate": ("a\ud83d", SOUND),
        "nul": ("a\0b", SOUND),
        "long": ("word " * 40_000, SOUND),
        "long-word": ("x" * 100_000, SOUND),
        "special-tokens": ("<s></s><pad><unk>", SOUND),
        "only-eos": ("</s>", SOUND),
        "emoji": ("🦊" * 50, SOUND),
        "combining": ("e" + "\u0301" * 2000, SOUND),
        "rtl": ("\u202eabc\u202c", SOUND),
        "separators": ("a\u2028b\u2029c\x85d", SOUND),
        "noncharacter": ("\ufffe\uffff", SOUND),
        "private": ("\ue000" * 5, SOUND),
        "crlf": ("a\r\nb", SOUND),
        "template": ("{{ messages[0] }} {% raise %}", SOUND),
    }
    for name, (text, expect) in texts.items():
        for algorithm in ("sft", "dpo", "ppo"):
            column = rng.choice(COLUMNS[algorithm])

            def change(rows, column=column, text=text):
                rows[3][column] = text
                return rows

            yield _case("data", f"text-{name}-{algorithm}-{column}", algorithm, change, expect, dry=False)
    double = '{"prompt": "a", "prompt": "b", "completion": "c"}'
    yield _case("data", "duplicate-keys", "sft", lambda rows: [double, *rows], SOUND)
    many = lambda rows: [row | {f"c{i}": i for i in range(2000)} for row in rows]  # noqa: E731
    yield _case("data", "2000-columns", "sft", many, RUNS)
    named = lambda rows: [row | {"": 1, " ": 2, "\ud83d": 3, "a\nb": 4} for row in rows]  # noqa: E731
    yield _case("data", "odd-names-sft", "sft", named, SOUND)
    yield _case("data", "odd-names-ppo", "ppo", named, SOUND, dry=False)
    reserved = lambda rows: [row | {"step": 1, "records": 2, "prompts": 3, "completions": 4} for row in rows]  # noqa: E731
    yield _case("data", "reserved-names-ppo", "ppo", reserved, SOUND, dry=False)


def _pairs():
    def every(**changes):
        return lambda rows: [row | {k: v(row) if callable(v) else v for k, v in changes.items()} for row in rows]

    def one(**changes):
        return lambda rows: every(**changes)(rows[:1]) + rows[1:]

    for algorithm in ("dpo", "reward"):
        yield _case("data", f"pairs-equal-{algorithm}", algorithm, every(rejected=lambda r: r["chosen"]))
        yield _case(
            "data", f"pair-equal-{algorithm}", algorithm, one(rejected=lambda r: r["chosen"]), WARNS, ("equal",)
        )
        spaced = every(rejected=lambda r: r["chosen"] + " ")
        yield _case("data", f"pairs-but-for-a-space-{algorithm}", algorithm, spaced, SOUND)
        yield _case("data", f"pairs-empty-{algorithm}", algorithm, every(chosen="", rejected=""))
        yield _case("data", f"pairs-chosen-empty-{algorithm}", algorithm, every(chosen=""))
        yield _case(
            "data", f"pairs-no-prompt-{algorithm}", algorithm, lambda rows: [_without(r, "prompt") for r in rows]
        )
        yield _case("data", f"pairs-blank-prompt-{algorithm}", algorithm, every(prompt=""), SOUND, dry=False)
        long = every(chosen="word " * 200, rejected="other " * 200)
        yield _case("data", f"pairs-too-long-{algorithm}", algorithm, long)
        yield _case("data", f"prompts-too-long-{algorithm}", algorithm, every(prompt="word " * 200))
        mixed = one(prompt=lambda r: [{"role": "user", "content": r["prompt"]}])
        yield _case("data", f"pairs-mixed-{algorithm}", algorithm, mixed, SOUND)
        other = lambda rows: [  # noqa: E731
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
            }
            for _ in rows
        ]
        yield _case("data", f"pairs-other-prompts-{algorithm}", algorithm, other)
        text = lambda rows: [{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"} for _ in rows]  # noqa: E731
        yield _case("data", f"pairs-no-answers-{algorithm}", algorithm, text)


def _without(row, *names):
    return {k: v for k, v in row.items() if k not in names}


_USER, _ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
MESSAGES = {
    "none": (None, REFUSED),
    "empty": ([], REFUSED),
    "text": ("hello", SOUND),
    "json-text": (json.dumps([_USER, _ANSWER]), SOUND),
    "number": (3, REFUSED),
    "object": ({"role": "user", "content": "a"}, REFUSED),
    "object-of-lists": ({"role": ["user", "assistant"], "content": ["a"]}, REFUSED),
    "numbers": ([1, 2], REFUSED),
    "texts": (["What?", "That."], REFUSED),
    "lists": ([["user", "What?"], ["assistant", "That."]], REFUSED),
    "nulls": ([None, None], REFUSED),
    "empty-objects": ([{}, {}], REFUSED),
    "no-role": ([{"content": "a"}, _ANSWER], REFUSED),
    "role-null": ([{"role": None, "content": "a"}, _ANSWER], REFUSED),
    "role-number": ([{"role": 1, "content": "a"}, _ANSWER], REFUSED),
    "role-list": ([{"role": ["user"], "content": "a"}, _ANSWER], REFUSED),
    "role-unknown": ([{"role": "wizard", "content": "a"}, _ANSWER], REFUSED),
    "role-blank": ([{"role": "", "content": "a"}, _ANSWER], REFUSED),
    "role-upper": ([{"role": "USER", "content": "a"}, _ANSWER], SOUND),
    "no-content": ([{"role": "user"}, _ANSWER], REFUSED),
    "content-null": ([_USER, {"role": "assistant", "content": None}], REFUSED),
    "content-number": ([_USER, {"role": "assistant", "content": 3}], REFUSED),
    "content-object": ([_USER, {"role": "assistant", "content": {"text": "a"}}], SOUND),
    "content-empty-list": ([_USER, {"role": "assistant", "content": []}], SOUND),
    "content-image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, _ANSWER], REFUSED),
    "content-part-number": ([{"role": "user", "content": [{"type": "text", "text": 3}]}, _ANSWER], REFUSED),
    "content-part-null": ([{"role": "user", "content": [None]}, _ANSWER], REFUSED),
    "content-blank": ([_USER, {"role": "assistant", "content": "  "}], SOUND),
    "content-surrogate": ([_USER, {"role": "assistant", "content": "\ud83d"}], SOUND),
    "only-system": ([{"role": "system", "content": "a"}], REFUSED),
    "only-user": ([_USER], REFUSED),
    "only-assistant": ([_ANSWER], SOUND),
    "assistant-first": ([_ANSWER, _USER], SOUND),
    "assistant-twice": ([_USER, _ANSWER, _ANSWER], SOUND),
    "user-twice": ([_USER, _USER, _ANSWER], SOUND),
    "system-last": ([_USER, _ANSWER, {"role": "system", "content": "x"}], SOUND),
    "system-twice": ([{"role": "system", "content": "x"}] * 2 + [_USER, _ANSWER], SOUND),
    "ends-with-user": ([_USER, _ANSWER, _USER], SOUND),
    "tool-alone": ([{"role": "tool", "content": "x"}], REFUSED),
    "tool-calls-text": ([_USER, {"role": "assistant", "content": "", "tool_calls": "x"}], SOUND),
    "tool-calls-number": ([_USER, {"role": "assistant", "content": None, "tool_calls": 3}], SOUND),
    "tool-calls-only": ([_USER, {"role": "assistant", "tool_calls": [{"function": None}]}], SOUND),
    "weight-nan": ([_USER, _ANSWER | {"weight": float("nan")}], REFUSED),
    "weight-inf": ([_USER, _ANSWER | {"weight": float("inf")}], REFUSED),
    "weight-negative": ([_USER, _ANSWER | {"weight": -1}], REFUSED),
    "weight-text": ([_USER, _ANSWER | {"weight": "x"}], REFUSED),
    "weight-half": ([_USER, _ANSWER | {"weight": 0.5}], SOUND),
    "weight-zero-all": ([_USER, _ANSWER | {"weight": 0}], REFUSED),
    "thousand-turns": ([_USER, _ANSWER] * 500, SOUND),
    "long-turn": ([_USER, {"role": "assistant", "content": "x " * 100_000}], SOUND),
    "nested": ([[_USER, _ANSWER]], REFUSED),
    "sharegpt-unknown": ([{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}], REFUSED),
    "sharegpt-mixed": ([{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}], SOUND),
    "both-keys": ([{"role": "user", "from": "gpt", "content": "a", "value": "b"}, _ANSWER], SOUND),
    "name-number": ([_USER | {"name": 3}, _ANSWER], SOUND),
}


def _messages(rng):
    """A list of messages in every record, then in one record of good ones."""
    good = [_USER, _ANSWER]
    template = "c.model.chat_template = '{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}'"
    for name, (value, expect) in MESSAGES.items():
        for scope in ("all", "one"):

            def change(rows, value=value, scope=scope):
                return [{"messages": value if scope == "all" or n == 5 else good} for n, _ in enumerate(rows)]

            soft = name in ("none", "empty", "object", "only-user", "only-system", "tool-alone", "weight-zero-all")
            softer = SOUND if scope == "one" and soft else expect
            lines = (template,) if rng.random() < 0.5 else ()
            yield _case("messages", f"sft-{name}-{scope}", "sft", change, softer, lines=lines)
    for name, (value, expect) in MESSAGES.items():
        algorithm = rng.choice(("dpo", "reward", "ppo"))
        if algorithm == "ppo":
            kept = {"object", "only-user", "tool-alone", "ends-with-user"}
            harmless = name.startswith(("weight", "content-null", "content-number")) or name in kept
            softer = SOUND if harmless or name == "no-content" else expect
            yield _case(
                "messages", f"ppo-{name}", "ppo", lambda rows, v=value: [{"prompt": v} for _ in rows], softer, dry=False
            )
            continue
        side = rng.choice(("chosen", "rejected"))

        def change(rows, value=value, side=side):
            both = {"chosen": good, "rejected": [_USER, {"role": "assistant", "content": "No."}]}
            return [both | {side: value} for _ in rows]

        softer = SOUND if name in ("weight-zero-all", "weight-nan", "weight-inf", "weight-negative") else expect
        if name == "weight-text":
            softer = SOUND
        yield _case("messages", f"{algorithm}-{side}-{name}", algorithm, change, softer)
    for name, change in {
        "messages-then-pairs": lambda rows: [{"messages": good}] * 5 + rows,
        "pairs-then-messages": lambda rows: rows + [{"messages": good}] * 5,
    }.items():
        yield _case("messages", f"mixed-{name}", "sft", change, SOUND)


def _numbers():
    """`weight` and `margin` columns."""
    values = {
        "nan": (float("nan"), REFUSED),
        "inf": (float("inf"), REFUSED),
        "negative": (-1, REFUSED),
        "text": ("x", REFUSED),
        "list": ([1], REFUSED),
        "true": (True, SOUND),
        "zero": (0, REFUSED),
        "huge": (1e300, REFUSED),
        "tiny": (1e-300, SOUND),
        "digits": (RAW + "9" * 400, REFUSED),
        "null": (None, SOUND),
        "blank": ("", SOUND),
    }
    for name, (value, expect) in values.items():
        for algorithm in ("sft", "dpo"):

            def change(rows, value=value):
                return [row | {"weight": value} for row in rows]

            mapped = "c.data.sources = ({'path': 'x.jsonl', 'columns': {'weight': 'weight'}},)"
            yield _case("data", f"weight-{name}-{algorithm}", algorithm, change, expect, lines=(mapped,), dry=False)

        def change(rows, value=value):
            return [row | {"margin": value} for row in rows]

        used = SOUND if name in ("zero", "negative", "true") else REFUSED if name in ("null", "blank") else expect
        lines = ("c.algorithm.use_margin = True",)
        yield _case("data", f"margin-{name}", "reward", change, used, lines=lines, dry=False)


def _labels():
    """Which of two answers is better, said by a code."""
    codes = {
        "0-1-2": ([0, 1, 2], REFUSED),
        "1-2": ([1, 2], SOUND),
        "1-2-3": ([1, 2, 3], REFUSED),
        "floats": ([1.0, 2.0], SOUND),
        "halves": ([1.5, 2.5], REFUSED),
        "texts": (["first", "second"], REFUSED),
        "letters": (["A", "B"], REFUSED),
        "yes-no": (["yes", "no"], REFUSED),
        "nulls": ([None], REFUSED),
        "lists": ([[1], [2]], REFUSED),
        "nan": ([float("nan")], REFUSED),
        "negative": ([-1, 1], REFUSED),
        "truth": ([True, False], REFUSED),
    }
    for name, (values, expect) in codes.items():

        def change(rows, values=values):
            return [
                {
                    "instruction": r["prompt"],
                    "output_1": "this",
                    "output_2": "that",
                    "preference": values[n % len(values)],
                }
                for n, r in enumerate(rows)
            ]

        yield _case("data", f"preference-{name}", "dpo", change, expect)
    two = lambda rows: [{"prompt": r["prompt"], "output_1": "a", "output_2": "b", "label": 1} for r in rows]  # noqa: E731

    def make(place):
        _write(place, two(good_rows(place.world, "dpo")))
        columns = '{"chosen": "output_1", "rejected": "output_2"}'
        return train(place, "dpo", f'c.data.sources = ({{"path": "x.jsonl", "columns": {columns}}},)', dry=True)

    yield Case("data", "preference-left-out", make, REFUSED, ("label",))


def _whole_sets():
    """Sets of which nothing is left, or too little."""
    yield _case("data", "no-rows", "sft", lambda rows: [])
    yield _case("data", "one-row", "sft", lambda rows: rows[:1], SOUND, dry=False)
    yield _case("data", "one-row-ppo", "ppo", lambda rows: rows[:1], SOUND, dry=False)
    yield _case("data", "all-too-long", "sft", lambda rows: [r | {"completion": "word " * 500} for r in rows])
    yield _case("data", "prompts-as-pairs", "dpo", lambda rows: [{"prompt": "a"} for _ in rows])
    yield _case("data", "texts-as-pairs", "reward", lambda rows: [{"text": "a"} for _ in rows])
    yield _case(
        "data", "pairs-as-sft", "sft", lambda rows: [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9, SOUND
    )
    yield _case("data", "labelled-false", "sft", lambda rows: [r | {"label": False} for r in rows])
    fraction = ("c.data.eval_fraction = 0.5",)
    yield _case("data", "eval-of-one-row", "sft", lambda rows: rows[:1], REFUSED, lines=fraction)
    equal = lambda rows: [rows[0]] * 20  # noqa: E731
    yield _case("data", "all-the-same", "sft", equal, WARNS, ("duplicate|same|twice",))

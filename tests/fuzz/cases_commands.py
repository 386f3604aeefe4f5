"""The commands beside `train`: their flags, and the files that they are given."""

from __future__ import annotations

import contextlib
import json
import os
import random
import stat

from tests.fuzz.case import REFUSED, RUNS, SOUND, WARNS, Case

# (command, the arguments that make it run); {w} is the world
GOOD = {
    "generate": ("--model={w}/model", "--prompt=the", "--max_new_tokens=3"),
    "logprobs": ("--model={w}/model", "--data=lines.jsonl"),
    "score": ("--model={w}/model-rm", "--data=lines.jsonl"),
    "compare": (
        "--base={w}/model", "--aligned={w}/model", "--data=lines.jsonl", "--num_prompts=2", "--max_new_tokens=3",
        "--reward={w}/r.py:reward",
    ),
    "export": ("--workdir=run", "--out=copy"),
}  # fmt: skip
LINES = [("the", " fox"), ("a", "b"), ("red", " leaf")]
_NUMBERS = {
    "generate": ("temperature", "max_new_tokens", "top_k", "top_p", "seed"),
    "compare": ("temperature", "max_new_tokens", "top_k", "top_p", "seed", "num_prompts", "show", "confidence"),
    "score": ("beta",),
}
_NOT_ZERO = ("max_new_tokens", "top_p", "num_prompts", "confidence", "beta")
_WHOLE = ("max_new_tokens", "top_k", "seed", "num_prompts", "show")


def cases(rng: random.Random) -> list[Case]:
    """The cases of the group `commands`."""
    return [*_numbers(), *_flags(rng), *_lines(rng), *_places()]


def write_lines(place, lines=LINES, name="lines.jsonl"):
    """A file of prompts and completions."""
    text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in lines)
    (place.here / name).write_text(text)


def arguments(place, command, **changes) -> list[str]:
    """A command's good arguments, some of them others; None leaves one out."""
    own = dict(a.format(w=place.world).lstrip("-").split("=", 1) for a in GOOD[command]) | changes
    return [command, *(f"--{k}={v}" if v != "" else f"--{k}" for k, v in own.items() if v is not None)]


def _case(name, command, changes, expect=REFUSED, words=(), prepare=write_lines, more=()):
    def make(place):
        prepare(place)
        return [*arguments(place, command, **changes), *more]

    return Case("commands", name, make, expect, words)


def _numbers():
    values = {
        "nan": "nan",
        "inf": "inf",
        "minus-inf": "-inf",
        "negative": "-1",
        "zero": "0",
        "text": "x",
        "none": "None",
    }
    values |= {"true": "True", "huge": "1" + "0" * 30, "digits": "9" * 5000, "exponent": "1e300", "part": "2.5"}
    for command, names in _NUMBERS.items():
        more = {"ref": "{w}/model", "beta": "0.1"} if command == "score" else {}
        for flag in names:
            for name, value in values.items():
                expect = REFUSED
                if name == "zero" and flag not in _NOT_ZERO:
                    expect = RUNS
                if name == "part" and flag not in (*_WHOLE, "confidence", "top_p"):
                    expect = RUNS
                if name == "huge" and flag in ("top_k", "show", "num_prompts"):
                    expect = SOUND
                if name == "huge" and flag == "max_new_tokens":
                    expect = REFUSED

                def make(place, command=command, flag=flag, value=value, more=more):
                    write_lines(place)
                    filled = {k: v.format(w=place.world) for k, v in more.items()}
                    if command == "score":
                        filled["model"] = f"{place.world}/model"
                    return (
                        arguments(place, command, **filled, **{flag: value})
                        if not more or flag not in more
                        else (arguments(place, command, **(filled | {flag: value})))
                    )

                yield Case("commands", f"{command}-{flag}-{name}", make, expect, (flag,) if expect == REFUSED else ())


def _flags(rng):
    for command, good in GOOD.items():
        for argument in good:
            flag = argument.lstrip("-").split("=", 1)[0]
            if flag != "prompt":
                yield _case(f"{command}-{flag}-empty", command, {}, words=(flag,), more=(f"--{flag}=",))
            yield _case(f"{command}-{flag}-twice", command, {}, SOUND, more=(argument.replace("{w}", "/proc/nowhere"),))
            if flag in ("model", "base", "aligned", "data", "workdir"):
                yield _case(f"{command}-without-{flag}", command, {flag: None}, words=(flag,))
                yield _case(f"{command}-{flag}-nowhere", command, {flag: "/proc/nowhere/at/all"}, words=(flag,))
                yield _case(f"{command}-{flag}-blank", command, {flag: " "}, words=(flag,))
                yield _case(f"{command}-{flag}-long", command, {flag: "x" * 1500}, words=(flag,))
                yield _case(f"{command}-{flag}-surrogate", command, {flag: "x\udcff"}, words=(flag,))
                yield _case(f"{command}-{flag}-device", command, {flag: "/dev/zero"}, words=(flag,))
                yield _case(f"{command}-{flag}-file", command, {flag: "file"}, words=(flag,), prepare=_file)
                yield _case(f"{command}-{flag}-looping", command, {flag: "loop"}, words=(flag,), prepare=_file)
                yield _case(f"{command}-{flag}-fifo", command, {flag: "fifo"}, words=(flag,), prepare=_file)
        wrong = rng.choice([a.lstrip("-").split("=", 1)[0] for a in good])[:-1]
        yield _case(f"{command}-misspelt", command, {}, more=(f"--{wrong}x=1",), words=(wrong,))
        yield _case(f"{command}-positional", command, {}, more=("word",), words=("word",))
        yield _case(f"{command}-empty-argument", command, {}, more=("",))
        yield _case(f"{command}-dash", command, {}, more=("-",))
        if command != "export":
            for dtype in ("float8", "int8", "", "None", "FLOAT32", "float64"):
                expect = SOUND if dtype in ("float64",) else REFUSED
                words = ("dtype",) if expect == REFUSED else ()
                name = f"{command}-dtype-{dtype or 'blank'}"
                yield _case(name, command, {}, expect, words, more=(f"--dtype={dtype}",))
    prompts = {"blank": "", "space": " ", "surrogate": "a\udcff", "nul": "a\0b", "long": "word " * 300,
               "special": "<s></s>", "emoji": "🦊"}  # fmt: skip
    for name, text in prompts.items():
        for chat in ((), ("--chat",)):

            def make(place, text=text, chat=chat):
                return ["generate", f"--model={place.world}/model", f"--prompt={text}", "--max_new_tokens=3", *chat]

            expect = REFUSED if name == "surrogate" else SOUND
            yield Case("commands", f"generate-prompt-{name}{'-chat' if chat else ''}", make, expect, ("prompt",))
    for name in ("", "trian", "TRAIN", "--train", "\udcff", "x" * 1500, "help me", "-x"):
        yield Case("commands", f"command-{name[:8].encode('ascii', 'replace').decode() or 'blank'}",
                   lambda p, name=name: [name], REFUSED)  # fmt: skip
    for command in (*GOOD, "train", "doctor"):
        yield Case("commands", f"{command}-help", lambda p, c=command: [c, "--help"], RUNS)
        yield Case("commands", f"{command}-help-and-more", lambda p, c=command: [c, "--nonsense", "--help"], SOUND)
    yield Case("commands", "doctor-more", lambda p: ["doctor", "now"], REFUSED)
    for command in GOOD:
        yield Case("commands", f"{command}-bare", lambda p, c=command: [c], REFUSED)


def _file(place):
    write_lines(place)
    (place.here / "file").write_text("hello")
    (place.here / "loop").symlink_to("loop")
    os.mkfifo(place.here / "fifo")


def _lines(rng):
    """Data files of the commands that read prompts and completions."""
    texts = {
        "empty": ("", SOUND),
        "blank": ("\n\n", SOUND),
        "binary": ("\x00\x01\x02", REFUSED),
        "word": ("hello\n", REFUSED),
        "list": ("[1]\n", REFUSED),
        "number": ("3\n", REFUSED),
        "null": ("null\n", REFUSED),
        "cut": ('{"prompt": "a", "compl', REFUSED),
        "no-prompt": ('{"completion": "a"}\n', REFUSED),
        "no-completion": ('{"prompt": "a"}\n', REFUSED),
        "prompt-null": ('{"prompt": null, "completion": "a"}\n', REFUSED),
        "prompt-number": ('{"prompt": 3, "completion": "a"}\n', REFUSED),
        "prompt-list": ('{"prompt": ["a"], "completion": "a"}\n', REFUSED),
        "completion-null": ('{"prompt": "a", "completion": null}\n', REFUSED),
        "completion-object": ('{"prompt": "a", "completion": {}}\n', REFUSED),
        "both-empty": ('{"prompt": "", "completion": ""}\n', SOUND),
        "surrogate": ('{"prompt": "\\ud83d", "completion": "a"}\n', REFUSED),
        "nul": ('{"prompt": "a\\u0000b", "completion": "a"}\n', SOUND),
        "long": (json.dumps({"prompt": "word " * 2_000, "completion": "a"}) + "\n", WARNS),
        "long-completion": (json.dumps({"prompt": "a", "completion": "word " * 2_000}) + "\n", WARNS),
        "deep": ("[" * 100_000, REFUSED),
        "digits": ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}\n", REFUSED),
        "third-bad": ('{"prompt": "a", "completion": "b"}\n' * 2 + "oops\n", REFUSED),
        "messages": ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n', SOUND),
    }
    for command in ("logprobs", "score", "compare"):
        for name, (text, expect) in texts.items():
            soft = command == "compare" and name in (
                "no-completion", "completion-null", "surrogate", "messages", "prompt-null"
            )  # fmt: skip
            if command == "compare" and name in ("empty", "blank", "both-empty"):
                expect = REFUSED
            if (command, name) == ("logprobs", "messages"):
                expect = SOUND
            words = {REFUSED: ("lines.jsonl",), WARNS: ("longer than",)}.get(expect, ())

            def make(place, command=command, text=text):
                (place.here / "lines.jsonl").write_text(text)
                return arguments(place, command)

            yield Case("commands", f"{command}-lines-{name}", make, SOUND if soft else expect,
                       () if soft else words)  # fmt: skip
        for encoding in ("utf-16", "latin-1"):

            def make(place, command=command, encoding=encoding):
                (place.here / "lines.jsonl").write_text('{"prompt": "é", "completion": "b"}\n', encoding=encoding)
                return arguments(place, command)

            expect = SOUND if encoding == "utf-16" else REFUSED
            yield Case("commands", f"{command}-lines-{encoding}", make, expect, ("lines.jsonl",))


def _places():
    """Models of the wrong kind, rewards, and where results go."""
    yield _case("generate-of-reward", "generate", {"model": "{w}"}, words=("model",))

    def with_world(name, command, expect=REFUSED, words=(), **changes):
        def make(place):
            write_lines(place)
            return arguments(place, command, **{k: v and v.format(w=place.world) for k, v in changes.items()})

        return Case("commands", name, make, expect, words)

    yield with_world("generate-with-reward-model", "generate", model="{w}/model-rm", words=("model",))
    yield with_world("logprobs-with-reward-model", "logprobs", model="{w}/model-rm", words=("model",))
    yield with_world("score-with-language-model", "score", model="{w}/model", words=("model",))
    yield with_world("score-beta-alone", "score", model="{w}/model", beta="0.1", words=("ref",))
    yield with_world("score-ref-alone", "score", model="{w}/model", ref="{w}/model", words=("beta",))
    yield with_world("score-ref-nowhere", "score", model="{w}/model", ref="/proc/nowhere", beta="0.1", words=("ref",))
    yield with_world("score-ref-reward", "score", model="{w}/model", ref="{w}/model-rm", beta="0.1", words=("ref",))
    yield with_world("compare-base-reward", "compare", base="{w}/model-rm", words=("base",))
    yield with_world("compare-reward-nowhere", "compare", reward="/proc/nowhere", words=("reward",))
    yield with_world("compare-reward-lm", "compare", reward="{w}/model", words=("reward",))
    yield with_world("compare-reward-blank", "compare", reward=" ", words=("reward",))
    yield with_world("compare-reward-no-function", "compare", reward="{w}/r.py:nothing", words=("nothing",))
    yield with_world("compare-reward-model", "compare", RUNS, reward="{w}/model-rm")
    for name, out in {"directory": "{w}", "nowhere": "/proc/nope/x.json", "blank": " ", "long": "x" * 300}.items():
        yield with_world(f"compare-out-{name}", "compare", words=("out",), out=out)

    def full(place):  # a device of its own: root could put a file in the place of the machine's
        write_lines(place)
        out = "/dev/full"
        with contextlib.suppress(OSError):
            os.mknod(place.here / "full", stat.S_IFCHR | 0o666, os.makedev(1, 7))
            out = "full"
        return arguments(place, "compare", out=out)

    yield Case("commands", "compare-out-full", full, REFUSED, ("full",))

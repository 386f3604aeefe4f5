"""Commands that ask models (export, generate, chat, logprobs, score, evaluate, compare) or the machine (doctor)."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign.commands.flags import (
    DTYPE,
    LINES,
    MODEL,
    REQUIRED,
    SEPARATE,
    TEMPLATE,
    parser,
    sampling,
    sampling_flags,
    template_kwargs,
)
from jaxalign.disk import check_out, write_whole
from jaxalign.errors import InputError


def export(argv: list[str]) -> int:
    flags = parser(
        "export",
        "Writes a run's model as a Hugging Face directory, from one of its checkpoints.",
        ("--workdir", str, REQUIRED, "a run's directory, or that of a run with stages"),
        ("--out", str, None, "where to write: a new or empty directory, or an earlier export; needed without --push"),
        ("--stage", str, None, "which stage, where workdir holds several"),
        ("--checkpoint", str, "last", "last, best, or a number"),
        ("--dtype", str, None, "of the weights in the file; default: as they were trained"),
        ("--merge", bool, False, "a whole model where an adapter was trained; default: the adapter, in PEFT's form"),
        ("--push", str, None, "upload to this repository of the Hugging Face hub, OWNER/NAME; a new one is private"),
    )
    args = flags.parse_args(argv)
    if not args.out and not args.push:
        raise InputError("export without --out and --push", "where the model goes", "--out exported/NAME")
    if args.push and "://" in (args.out or ""):
        raise InputError(f"--push with --out {args.out}", "a directory of this machine", "--out exported/NAME")
    from jaxalign.pipeline.export import export
    from jaxalign.pipeline.push import check_push, push

    if args.push:
        check_push(args.push)
    with contextlib.ExitStack() as scratch:
        out = args.out or scratch.enter_context(tempfile.TemporaryDirectory(prefix="jaxalign-export-")) + "/model"
        where = export(
            args.workdir, out, stage=args.stage, checkpoint=args.checkpoint, dtype=args.dtype, merge=args.merge
        )
        if args.out:
            print(where)
        if args.push:
            print(push(where, args.push, kept=bool(args.out)))
    return 0


def generate(argv: list[str]) -> int:
    flags = parser(
        "generate",
        "Continues a prompt and prints the completion, nothing else.",
        MODEL,
        ("--prompt", str, REQUIRED, "the text to continue, as it stands"),
        *sampling_flags(within_room=True),
        (
            "--chat",
            bool,
            None,
            "the prompt is a user's message: put into the model's chat template, if it has one",
        ),
        TEMPLATE,
        DTYPE,
    )
    args = flags.parse_args(argv)
    from jaxalign.pipeline.generate import generate

    options = {"chat": args.chat, "chat_template_kwargs": template_kwargs(args), "dtype": args.dtype}
    room = args.max_new_tokens is None
    print(generate(args.model, args.prompt, sampling(args), seed=args.seed, within_room=room, **options))
    return 0


def chat(argv: list[str]) -> int:
    """Talks with a model."""
    flags = parser(
        "chat",
        "Talks with a model: each line typed (or piped in) is a message, answers appear as they are decoded. The\n"
        "dialogue is put into the model's chat template, or written as plain text, as in training, where it has none.\n"
        "/reset begins anew, Ctrl-C stops an answer, /quit ends.",
        MODEL,
        ("--system", str, None, "a system message before the dialogue"),
        TEMPLATE,
        *sampling_flags(within_room=True),
        DTYPE,
    )
    args = flags.parse_args(argv)
    from jaxalign.pipeline.chat import chat

    options = {"system": args.system, "chat_template_kwargs": template_kwargs(args), "dtype": args.dtype}
    chat(args.model, sampling(args), seed=args.seed, within_room=args.max_new_tokens is None, **options)
    return 0


def logprobs(argv: list[str]) -> int:
    flags = parser(
        "logprobs",
        'Prints {"sum_logprob": nats, "num_tokens": n} for each line, in order: the completion given the prompt.\n'
        "Both are tokenised as one text, as in training; EOS counts only where the completion holds it.",
        MODEL,
        LINES,
        SEPARATE,
        DTYPE,
    )
    args = flags.parse_args(argv)
    from jaxalign.pipeline.logprobs import logprobs

    logprobs(args.model, args.data, separate=args.separate, dtype=args.dtype)
    return 0


def score(argv: list[str]) -> int:
    flags = parser(
        "score",
        'Prints {"score": x} for each line, in order: a reward model\'s score at the last token of prompt and\n'
        "completion, or, with --ref and --beta, DPO's implicit reward beta (log p_model - log p_ref).",
        MODEL,
        LINES,
        ("--ref", str, None, "reference policy: what the model was before DPO"),
        ("--beta", float, None, "of the DPO run"),
        ("--append_eos", bool, None, "end each completion by EOS, as in training; default: as it stands"),
        SEPARATE,
        DTYPE,
    )
    args = flags.parse_args(argv)
    from jaxalign.pipeline.score import score

    score(
        args.model,
        args.data,
        ref=args.ref,
        beta=args.beta,
        append_eos=args.append_eos,
        separate=args.separate,
        dtype=args.dtype,
    )
    return 0


def compare(argv: list[str]) -> int:
    flags = parser(
        "compare",
        "Two models side by side on held-out prompts: samples, win rate under a reward with its interval, perplexity\n"
        "of the completions in the data, diversity.",
        ("--base", str, REQUIRED, "the model before: directory or hub id"),
        ("--aligned", str, REQUIRED, "the model after"),
        ("--data", str, REQUIRED, "held-out records as training reads them: files with commas, or a list of dicts"),
        ("--reward", str, None, "a reward model's directory, module:function or FILE.py:function"),
        ("--num_prompts", int, None, "how many of the data's prompts; default: all"),
        ("--show", int, 5, "how many samples to show"),
        ("--confidence", float, 0.95, "of the win rate's interval"),
        *sampling_flags(),
        TEMPLATE,
        ("--out", str, None, "a file for all of it as JSON"),
        ("--json", bool, None, "print the JSON instead of the page"),
        DTYPE,
    )
    args = flags.parse_args(argv)
    from jaxalign.pipeline.compare import compare, page
    from jaxalign.pipeline.overrides import tuple_of

    if args.out:
        check_out(args.out)  # before the models answer, which takes long
    result = compare(
        args.base,
        args.aligned,
        tuple_of("data.sources", args.data),
        sampling(args),
        reward=args.reward,
        num_prompts=args.num_prompts,
        confidence=args.confidence,
        dtype=args.dtype,
        seed=args.seed,
        chat_template_kwargs=template_kwargs(args),
    )
    width = min(120, shutil.get_terminal_size((120, 0)).columns)
    _give(result, args.out, lambda: page(result, show=args.show, width=width), args.json)
    return 0


def evaluate(argv: list[str]) -> int:
    """Measures a model on held-out data."""
    flags = parser(
        "evaluate",
        "A model's figures on held-out data, without training: accuracy, margins and calibration on pairs, loss and\n"
        "perplexity on completions. The model may be a reward model or a language model; the figures are those of\n"
        "training's own evaluations. Further fields of the stage as --FIELD=VALUE: --max_length=512 --beta=0.1.",
        MODEL,
        (
            "--data",
            str,
            REQUIRED,
            "held-out records as training reads them: files with commas, or a list of dicts",
        ),
        ("--reference", str, None, "what a DPO model started from, for its implicit reward"),
        ("--out", str, None, "a file for all of it as JSON"),
        ("--json", bool, None, "print the JSON instead of the page"),
    )
    args, rest = flags.parse_known_args(argv)
    from jaxalign.pipeline.evaluate import evaluate, page
    from jaxalign.pipeline.overrides import tuple_of

    if args.out:
        check_out(args.out)
    data = tuple_of("data.sources", args.data)
    result = evaluate(args.model, data, reference=args.reference, flags=rest)
    _give(result, args.out, lambda: page(result), args.json)
    return 0


def _give(result: dict[str, Any], out: str | None, page: Callable[[], str], as_json: bool) -> None:
    """Writes a result to a file where one is named, and prints it."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if out:
        try:
            write_whole(Path(out).expanduser(), text + "\n")
        except InputError:
            print(text)  # so that minutes of work are not lost
            raise
    print(text if as_json else page())


def doctor(argv: list[str]) -> int:
    parser("doctor", "Prints devices, versions, memory and missing extras, and tries a small step.").parse_args(argv)
    from jaxalign.pipeline.doctor import doctor

    return doctor()

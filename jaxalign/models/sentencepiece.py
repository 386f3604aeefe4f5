"""Tokenizers that come as a sentencepiece `tokenizer.model` alone.

transformers 5.23 orders the merges of such a file by id and not by score, so that "\\n  hi" becomes other tokens than
sentencepiece makes of it. Here the merges go by score, and the result is held against sentencepiece itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxalign.errors import InputError
from jaxalign.models.hub import read_json

_PROBES = (
    "Once upon a time\n  hi",
    "a  b   c\t\td",
    "  leading, trailing  ",
    "def f(x):\n    return x + 1\n\n\n",
    "café, naïve, 日本語, мир 🙂",
    "1234 5,678.90 -- don't",
)


def from_sentencepiece(file: Path) -> Any:
    """A transformers tokenizer that makes the tokens sentencepiece makes; BOS at the start unless the config says no.

    Args:
      file: a byte-pair `tokenizer.model`; a `tokenizer_config.json` beside it is honoured for its chat template, its
        special tokens, `add_bos_token` and `add_eos_token`.

    Returns:
      A PreTrainedTokenizerFast.

    Raises:
      InputError: the file is of another type, or cannot be reproduced.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{file} cannot be read: {error}", "a sentencepiece model", "--config.model.tokenizer=DIR"
        ) from error
    ids = range(model.vocab_size())
    vocabulary = {model.id_to_piece(i): i for i in ids}
    plain = [i for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    unknown, byte_fallback = model.id_to_piece(model.unk_id()), any(model.is_byte(i) for i in ids)
    back_end = Tokenizer(
        BPE(
            vocabulary, _merges(model, plain, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
        )
    )
    prefix = model.encode("a", out_type=str)[0].startswith("▁")
    spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    back_end.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Strip(" ", 1, 0)] * prefix
    back_end.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for text in _PROBES:
        if back_end.encode(text, add_special_tokens=False).ids != model.encode(text):
            raise InputError(
                f"{file}, which is no byte-pair model with byte fallback",
                "a tokenizer.json beside it, or such a model",
                "a directory of this tokenizer that has a tokenizer.json: --config.model.tokenizer=DIR",
            )
    settings = file.with_name("tokenizer_config.json")
    config = read_json(settings) if settings.is_file() else {}
    special = [AddedToken(model.id_to_piece(i), special=True, normalized=False) for i in ids if model.is_control(i)]
    back_end.add_special_tokens(special)
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        back_end.add_tokens([AddedToken(**token)])
    names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
    tokens = {name: model.id_to_piece(i) for name, i in names.items() if i >= 0} | {"unk_token": unknown}
    for name in (*names, "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        tokens |= {name: value} if value is not None else {}
    first, last = (
        [(tokens[n], back_end.token_to_id(tokens[n]))] if add and n in tokens else []
        for n, add in (
            ("bos_token", config.get("add_bos_token", True)),
            ("eos_token", config.get("add_eos_token", False)),
        )
    )
    if first or last:
        one = [*(t for t, _ in first), "$A", *(t for t, _ in last)]
        two = [*one, *(f"{t}:1" for t, _ in first), "$B:1", *(f"{t}:1" for t, _ in last)]
        back_end.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=first + last)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=back_end, **tokens)
    tokenizer.chat_template = config.get("chat_template")
    return tokenizer


def _merges(model: Any, plain: list[int], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best score first, as sentencepiece joins them."""
    ranked = []
    for i in plain:
        piece = model.id_to_piece(i)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-model.get_score(i), vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]

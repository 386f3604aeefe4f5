"""The tokenizer of a model: its chat template, its padding token, and the tokens that end a completion."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.template_inputs import set_defaults
from jaxalign.errors import InputError
from jaxalign.models.added_tokens import Added
from jaxalign.models.hf_values import token_ids
from jaxalign.models.hub import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, file_of, locate, read_json, tokenizer_home
from jaxalign.models.text_part import text_fields

# What transformers reads of a tokenizer.
_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
_FEW = 16  # tokens that a message names one by one
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")


def load_tokenizer(
    path: str | Path,
    revision: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    flag: str = "--config.data.chat_template_kwargs",
) -> Any:
    """Reads a tokenizer with `transformers`, and settles its padding token.

    Args:
      path: a directory, a URL or a hub id.
      revision: of a hub id.
      chat_template: a file, or the template itself; None: the tokenizer's own, if it has one.
      chat_template_kwargs: values of names that the template reads, which are written into it.
      flag: what gave these, for messages.

    Returns:
      A transformers tokenizer whose `pad_token_id` is set, see `choose_pad`.

    Raises:
      InputError: no tokenizer there, or one that cannot be read; a name that its template never reads.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here
    from transformers import AutoTokenizer

    directory = tokenizer_home(locate(path, revision, weights=False))
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"no tokenizer in {directory}", " or ".join(TOKENIZER_FILES[:2]), "--config.model.tokenizer=DIR"
        )
    if (directory / CONFIG).is_file():
        read_json(directory / CONFIG)  # transformers reads it too, and would blame the tokenizer
    only = directory / "tokenizer.model"
    if only.is_file() and not (directory / "tokenizer.json").is_file():
        from jaxalign.models.sentencepiece import from_sentencepiece

        tokenizer = from_sentencepiece(only)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # transformers raises whatever its back end raised
            for name in _JSON_FILES:  # one that is no JSON is named
                if (directory / name).is_file():
                    read_json(directory / name)
            reason = " ".join(str(error).split()) or type(error).__name__
            if _of_config(directory, error):
                expected = "a configuration that transformers takes"
                raise InputError(
                    f"{directory / CONFIG}: {reason[:400]}", expected, f"the checkpoint's own {CONFIG}"
                ) from error
            raise InputError(
                f"the tokenizer in {directory} cannot be read: {reason[:400]}",
                "a whole tokenizer.json",
                "--config.model.tokenizer=a directory with one",
            ) from error
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
        _check_syntax(tokenizer, chat_template)
    _check_settings(tokenizer, directory)
    set_defaults(tokenizer, chat_template_kwargs or {}, flag)
    tokenizer.pad_token_id = choose_pad(tokenizer)
    return tokenizer


def _of_config(directory: Path, error: Exception) -> bool:
    """Whether transformers says the same of the configuration, which it reads before the tokenizer."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as other:
        return str(other) == str(error)
    return False


def _template(chat_template: str) -> str:
    """The text of a template that is given as a file or as itself."""
    if "{" in chat_template:
        return chat_template
    fix = "--config.model.chat_template=FILE.jinja"
    file = Path(chat_template).expanduser()
    try:
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            if text.strip():
                return text
            raise InputError(f"chat_template {chat_template[:300]!r}: the file is empty", "a Jinja template", fix)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template {chat_template[:300]!r}: {error}", "a file of UTF-8 text", fix) from error
    raise InputError(f"chat_template {chat_template[:300]!r}", "a file that is there, or a Jinja template", fix)


def _check_syntax(tokenizer: Any, chat_template: str) -> None:
    """Refuses a template that no conversation can be rendered with; one that only refuses this one is none such."""
    import jinja2

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        where = "the template" if "{" in chat_template else chat_template
        raise InputError(
            f"chat_template: line {error.lineno} of {where}: {error.message}",
            "a Jinja template",
            "--config.model.chat_template=FILE.jinja",
        ) from error
    except Exception:  # it may want a system message, tools, or another order of turns
        return


def _check_settings(tokenizer: Any, directory: Path) -> None:
    """Settings that transformers takes as they are and trips over when the first text comes."""
    for name, kinds in (("chat_template", (str, dict, list, type(None))), ("model_max_length", (int, float))):
        value = getattr(tokenizer, name, None)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(
                f"{name} is {value!r} in {directory / 'tokenizer_config.json'}",
                "a template" if name == "chat_template" else "a number",
                f"that file with a right {name}, or without it",
            )
    named = tokenizer.chat_template
    if isinstance(named, dict) and named and "default" not in named:
        raise InputError(
            f"the tokenizer in {directory} has chat templates {', '.join(map(repr, named))}, none of them 'default'",
            "one that is taken where none is asked for",
            "--config.model.chat_template=FILE.jinja",
        )


def choose_pad(tokenizer: Any) -> int:
    """The id that fills rows: masks say what is padding, yet tools that read an export go by the id.

    The tokenizer's own padding token where it differs from EOS; else a token that is made for it, or reserved; else
    the unknown token where it is neither BOS nor EOS; else EOS.

    Raises:
      InputError: none of these exists.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer.pad_token_id
    vocabulary = tokenizer.get_vocab()
    for name in _PAD_NAMES:
        if name in vocabulary and vocabulary[name] not in ends:
            return vocabulary[name]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
        return tokenizer.unk_token_id
    if tokenizer.eos_token_id is None:
        raise InputError(
            "a tokenizer with neither a padding nor an EOS token",
            "at least an EOS token",
            'set "eos_token" in its tokenizer_config.json',
        )
    return tokenizer.eos_token_id


def check_vocabulary(
    tokenizer: Any,
    vocab_size: int,
    path: str = "the model",
    fix: str = "",
) -> None:
    """Makes sure that the model has a vector for every token; a model may have more vectors than there are tokens.

    Args:
      tokenizer: of transformers; its added tokens count, since any text may hold them.
      vocab_size: V of the model.
      path: of the model, for messages.
      fix: what to do where the tokenizer has more; "": of the model of a run, whose configuration can add tokens.

    Raises:
      InputError: naming the tokens whose id is V or more.
    """
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:3])
        own = fix or "--config.model.tokenizer=the model's own directory"
        if not fix and len(beyond) <= _FEW and all(token in tokenizer.get_added_vocab() for _, token in beyond):
            own = f"{_flag([token for _, token in beyond])}, which makes vectors for them; {own}"
        raise InputError(
            f"{len(beyond)} tokens without a vector in {path} of vocabulary {vocab_size}, such as {named}",
            f"ids below {vocab_size}: a tokenizer that belongs to the model",
            f"{own}, or without these tokens",
        )


def add_tokens(tokenizer: Any, tokens: Sequence[str], vocab_size: int) -> Added | None:
    """Gives a tokenizer tokens that no text splits, with the ids behind its own; those that it has keep theirs.

    Args:
      tokenizer: of transformers; changed in place.
      tokens: `model.add_tokens`.
      vocab_size: V of the checkpoint.

    Returns:
      What the checkpoint has no vectors of; None where it has all.

    Raises:
      InputError: a token that the tokenizer does not keep whole.
    """
    if not tokens:
        return None
    from transformers import AddedToken

    before, held = tokenizer.get_vocab(), set(tokenizer.added_tokens_decoder)
    wanted = [token for token in tokens if before.get(token) not in held]
    if wanted:
        made = [AddedToken(token, special=True, normalized=False) for token in wanted]
        tokenizer.add_tokens(made, special_tokens=True)
        tokenizer.pad_token_id = choose_pad(tokenizer)  # one of them may be for it: a later start would take it
    own = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    taken = {i: token for token, i in before.items()}
    for token, i in own.items():
        reads = list(tokenizer.encode(token, add_special_tokens=False))
        if reads != [i] or taken.get(i, token) != token:
            raise InputError(
                f"model.add_tokens holds {token!r}, which is read as {reads} and would be id {i}, "
                f"{taken.get(i, token)!r} before",
                "a token with an id of its own, which the tokenizer keeps whole",
                "--config.model.add_tokens without it, or a tokenizer whose ids have no gaps",
            )
    new = sorted(i for token, i in own.items() if token not in before or i >= vocab_size)
    if not new:
        return None
    return Added(vocab_size, tuple(new), _ranges(i for i in before.values() if i < vocab_size))


def ids_of(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of tokens that a tokenizer has."""
    return tuple(tokenizer.convert_tokens_to_ids(token) for token in tokens)


def _ranges(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ranges of ids, each from its first to one past its last.

    >>> _ranges([0, 2, 1, 5])
    ((0, 3), (5, 6))
    """
    found: list[list[int]] = []
    for i in sorted(set(ids)):
        if found and found[-1][1] == i:
            found[-1][1] += 1
        else:
            found.append([i, i + 1])
    return tuple((first, end) for first, end in found)


def _flag(tokens: Sequence[str]) -> str:
    """The flag that adds tokens.

    >>> _flag(["<a>", "<b>"])
    '--config.model.add_tokens=\\'["<a>", "<b>"]\\''
    """
    return f"--config.model.add_tokens='{json.dumps(list(tokens), ensure_ascii=False)}'"


def stop_ids(source: str | Path | Mapping[str, Any], tokenizer: Any, revision: str | None = None) -> tuple[int, ...]:
    """The tokens at which a completion ends: those of the generation config, of `config.json` and of the tokenizer.

    Args:
      source: a model's directory, URL or hub id, or a parsed generation config.
      tokenizer: of transformers.
      revision: of a hub id.

    Returns:
      Ids in ascending order; none where nothing names one.

    Raises:
      InputError: a file that cannot be read, or names something else.
    """
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if isinstance(source, Mapping):
        return tuple(sorted(found | set(token_ids(source, "eos_token_id", GENERATION_CONFIG))))
    directory = locate(source, revision, weights=False)
    for file in (GENERATION_CONFIG, CONFIG):
        if (there := file_of(directory, file)).is_file():
            fields = text_fields(read_json(there))
            found |= set(token_ids(fields, "eos_token_id", str(there)))
    return tuple(sorted(found))

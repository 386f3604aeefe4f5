"""Published sets whose rows need more than a mapping of columns, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from jaxalign.data.files import Raw
from jaxalign.data.records import BadRow, Message, Tally
from jaxalign.data.source import Source, config_line
from jaxalign.errors import InputError
from jaxalign.registry import Reads

RawRows = Iterator[Raw]


class Preset(NamedTuple):
    """How the rows of one published set are converted to our columns."""

    hub_ids: tuple[str, ...]
    signatures: tuple[tuple[str, ...], ...]  # columns that identify its schemas
    rows: Callable[[RawRows, Reads | None, Tally], RawRows]  # (rows, reads, tally) -> rows under our names


def preset_of(source: Source, first: Raw) -> Preset | None:
    """The preset of a source: named, or found by its hub id or columns; None where there is none.

    Raises:
      InputError: for a name that is not known, or data that is not in the preset's schema.
    """
    columns = set(first.row)
    if source.preset is not None and source.preset not in PRESETS:
        near = difflib.get_close_matches(source.preset, PRESETS, n=1, cutoff=0.0)[0]
        raise InputError(f"preset {source.preset!r}", f"one of {', '.join(PRESETS)}", config_line(source, preset=near))
    for name, preset in PRESETS.items():
        fits = any(columns.issuperset(signature) for signature in preset.signatures)
        named = source.preset == name or source.path.lower() in preset.hub_ids
        if source.preset not in (None, name) or not (named or (fits and name in _SHOWN_BY_COLUMNS)):
            continue
        if not fits and source.preset is None:
            continue  # another subset of the set
        if not fits:
            wanted = " or ".join(", ".join(signature) for signature in preset.signatures)
            raise InputError(
                f"{first.file}: columns {', '.join(first.row)}",
                f"those of the preset {name}: {wanted}",
                config_line(source, preset=None),
            )
        # With the user's own mapping, columns alone do not select a preset.
        return preset if named or not source.columns else None
    return None


def apply_preset(source: Source, rows: RawRows, reads: Reads | None, tally: Tally) -> RawRows:
    """The rows of a source, converted by its preset if it has one."""
    first = next(rows, None)
    if first is None:
        return iter(())
    preset = preset_of(source, first)
    rows = chain([first], rows)
    return rows if preset is None else preset.rows(rows, reads, tally)


def _hh_rlhf(rows: RawRows, reads: Reads | None, tally: Tally) -> RawRows:
    """Anthropic/hh-rlhf: two whole dialogues, which pairs with an implicit prompt already cover."""
    return rows


def _ultrafeedback(rows: RawRows, reads: Reads | None, tally: Tally) -> RawRows:
    """argilla/ultrafeedback-binarized-preferences and -cleaned: a pair with ratings; their difference is the margin."""
    for raw in rows:
        row = dict(raw.row)
        if "chosen_response" in row:
            row["messages"] = (
                None if row["instruction"] is None else [{"role": "user", "content": row.pop("instruction")}]
            )
            row["chosen"], row["rejected"] = row.pop("chosen_response"), row.pop("rejected_response")
            better, worse = row.get("chosen_avg_rating"), row.get("rejected_avg_rating")
        else:
            better, worse = row.get("chosen-rating"), row.get("rejected-rating")
        if better is not None and worse is not None:
            row["margin"] = better - worse
        yield raw._replace(row=row)


def _oasst(rows: RawRows, reads: Reads | None, tally: Tally) -> RawRows:
    """OpenAssistant/oasst1 and oasst2: trees of messages whose replies are ranked.

    Rows are single messages with `parent_id`, as on the hub, or whole nested trees.  For pairs every two replies of
    different rank to one message make a row, the dialogue so far being the prompt; for completions each message's
    best-ranked reply makes one, for prompts each message of the user.  Deleted messages, and those that failed review,
    are left out with all that answers them.
    """
    nested, flat = _by_shape(rows)
    for raw in chain(nested, _trees(flat, tally)):
        top = raw.row.get("prompt")
        root = top if isinstance(top, dict) else raw.row
        tree = raw.row.get("message_tree_id") or root.get("message_id")
        yield from _walk(raw, root, tree, reads, tally)


def _by_shape(rows: RawRows) -> tuple[list[Raw], list[Raw]]:
    nested: list[Raw] = []
    flat: list[Raw] = []
    for raw in rows:
        is_tree = isinstance(raw.row.get("prompt"), dict) or isinstance(raw.row.get("replies"), list)
        (nested if is_tree else flat).append(raw)
    return nested, flat


def _trees(flat: list[Raw], tally: Tally) -> Iterator[Raw]:
    """Nests messages under their parents; trees come in the order of their first messages."""
    flat = [raw for raw in flat if _named(raw, tally)]
    nodes = {raw.row.get("message_id"): {**raw.row, "replies": []} for raw in flat}
    roots = []
    for raw in flat:
        parent = raw.row.get("parent_id")
        if parent is None:
            roots.append(raw)
        elif parent in nodes:
            nodes[parent]["replies"].append(nodes[raw.row.get("message_id")])
        else:
            tally.drop("reply to a message that is not there", raw.where)
    for raw in roots:
        yield raw._replace(row=nodes[raw.row.get("message_id")])


def _named(raw: Raw, tally: Tally) -> bool:
    """Whether a message has valid ids; counted as a bad row if not."""
    for name in ("message_id", "parent_id"):
        if not isinstance(raw.row.get(name), (str, int, type(None))):
            tally.bad(_broken_tree(raw, f"{name} {raw.row[name]!r}", f"a string for {name}", f"broken {name}"))
            return False
    return True


_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _walk(raw: Raw, root: dict[str, Any], tree: Any, reads: Reads | None, tally: Tally) -> RawRows:
    """The rows of one tree."""
    stack: list[tuple[dict[str, Any], list[Message]]] = [(root, [])]
    while stack:  # no recursion: trees may be deeper than Python's limit
        node, path = stack.pop()
        if not _usable(node):
            tally.drop("message deleted or failed review", raw.where)
            continue
        role, text = _OASST_ROLES.get(str(node.get("role"))), node.get("text")
        if role is None or not isinstance(text, str):
            problem = f"message {node.get('message_id')} with role {node.get('role')!r} and text {text!r}"
            wanted = "role prompter or assistant, and a string for text"
            tally.bad(_broken_tree(raw, problem, wanted, "message with a broken role or text"))
            continue
        path = [*path, {"role": role, "content": text}]
        replies = []
        for reply in node.get("replies") or ():
            if isinstance(reply, dict) and not isinstance(reply.get("rank"), (int, float, type(None))):
                problem = f"message {reply.get('message_id')} with rank {reply['rank']!r}"
                tally.bad(_broken_tree(raw, problem, "a number for rank, or null", "message with a broken rank"))
            elif isinstance(reply, dict):
                replies.append(reply)
        if role == "user":
            known = {"message_tree_id": tree, "parent_id": node.get("message_id"), "lang": node.get("lang")}
            for row in _ranked(path, [reply for reply in replies if _usable(reply)], reads):
                yield raw._replace(row={**row, **known})
        stack.extend((reply, path) for reply in reversed(replies))


def _broken_tree(raw: Raw, problem: str, expected: str, reason: str) -> BadRow:
    fix = "repair or delete that tree"
    return BadRow(raw.where, problem[:300], expected, fix, reason)


def _usable(node: dict[str, Any]) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _ranked(path: list[Message], replies: list[dict[str, Any]], reads: Reads | None) -> Iterable[dict[str, Any]]:
    """The rows of one user message and its replies."""
    forms = ("pair",) if reads is None else reads.forms
    if "prompt" in forms:
        yield {"prompt": path}
        return
    ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda reply: reply["rank"])
    if "completion" in forms:
        if replies:
            yield {"prompt": path, "completion": (ranked or replies)[0].get("text")}
        return
    for i, better in enumerate(ranked):
        for worse in ranked[i + 1 :]:
            if better["rank"] < worse["rank"]:
                yield {
                    "messages": path,
                    "chosen": better.get("text"),
                    "rejected": worse.get("text"),
                    "chosen_rank": better["rank"],
                    "rejected_rank": worse["rank"],
                    "chosen_id": better.get("message_id"),
                    "rejected_id": worse.get("message_id"),
                }


PRESETS: dict[str, Preset] = {
    "hh-rlhf": Preset(("anthropic/hh-rlhf",), (("chosen", "rejected"),), _hh_rlhf),
    "oasst1": Preset(
        ("openassistant/oasst1", "openassistant/oasst2"),
        (("message_id", "parent_id", "role", "text"), ("message_tree_id", "prompt")),
        _oasst,
    ),
    "ultrafeedback-binarized-preferences": Preset(
        ("argilla/ultrafeedback-binarized-preferences", "argilla/ultrafeedback-binarized-preferences-cleaned"),
        (
            ("instruction", "chosen_response", "rejected_response"),
            ("prompt", "chosen", "rejected", "chosen-rating", "rejected-rating"),
        ),
        _ultrafeedback,
    ),
}
# Found by their columns alone; `chosen` and `rejected` are too common for that.
_SHOWN_BY_COLUMNS = ("oasst1", "ultrafeedback-binarized-preferences")

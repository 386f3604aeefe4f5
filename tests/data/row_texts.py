"""A row of a batch as text, for tests to read."""

import numpy as np

from jaxalign.types import CHOSEN, Batch


def row_texts(batch: Batch, row: int, tokenizer) -> list[str]:
    """A row of a batch as text, as the model sees it: one string per completion, with what is read out marked.

    Scored tokens stand in ⟦ ⟧; ⟨score⟩ stands behind a token whose score is read.  Everything is taken from the
    arrays of the batch: the text of a completion is what its last token sees, in the order of positions.

    Args:
      batch: numpy arrays.
      row: number of the row.
      tokenizer: decodes.
    """
    tokens, positions, start, end = (np.asarray(a)[row] for a in batch.rows[:4])
    source, target, completion, mask = (np.asarray(a)[row] for a in batch.readouts)
    role, used = np.asarray(batch.completions.role)[row], np.asarray(batch.completions.mask)[row]
    texts = []
    for c in np.flatnonzero(used).tolist():
        sources = source[mask & (completion == c)]
        by_token = bool(np.any(target[mask & (completion == c)]))
        last = len(tokens) - 1
        scored = set()
        if by_token:
            pick = min if role[c] == CHOSEN else max
            for s, t in zip(sources, target[mask & (completion == c)], strict=True):
                follows = (tokens == t) & (positions == positions[s] + 1) & (start <= s) & (s < end)
                scored.add(int(pick(np.flatnonzero(follows))))
            last = min(scored) if role[c] == CHOSEN and min(scored) < sources.min() else max(scored)
        elif len(sources):
            last = int(sources[0])
        seen = np.arange(start[last], end[last])
        texts.append(
            _marked(
                tokens,
                seen[np.argsort(positions[seen])],
                scored,
                set() if by_token else set(sources.tolist()),
                tokenizer,
            )
        )
    return texts


def _marked(tokens, order: np.ndarray, scored: set[int], read: set[int], tokenizer) -> str:
    text, run, inside = "", [], False
    for i in [*order.tolist(), None]:
        now = i in scored
        if run and (now != inside or i is None or run[-1] in read):
            said = tokenizer.decode([int(tokens[j]) for j in run])
            text += f"⟦{said}⟧" if inside else said
            text += "⟨score⟩" if run[-1] in read else ""
            run = []
        inside = now
        run.append(i)
    return text

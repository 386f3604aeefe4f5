"""What is measured: cases, the tokens they count and the FLOPs they need."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.contenders import is_ours

Sequences = list[tuple[int, int]]  # (tokens, tokens that the head reads) of each causal sequence


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama with untied embeddings."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 688
    vocab: int = 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: all contenders do the same work on the same data."""

    name: str
    task: str  # sft, dpo, reward, ppo, generate
    contenders: tuple[str, ...]  # jaxalign first
    shape: Shape = Shape()
    batch: int = 8  # sequences, pairs or prompts of a step
    length: int = 256  # tokens of a sequence
    prompt: int = 0  # of them, tokens of the prompt
    reference: str = ""  # dpo: live or cached
    rank: int = 0  # of an adapter for all linears of the layers; 0: the whole model is trained
    ragged: bool = False  # real lengths, at most `length`, in place of equal ones
    steps: int = 6  # of a turn
    batches: int = 48  # steps' worth of data; then the next epoch begins
    epochs: int = 4  # ppo: passes over an iteration's experience
    minibatches: int = 2  # ppo: updates of a pass
    alone: bool = False  # contenders one after the other, each with the machine's memory to itself

    @property
    def response(self) -> int:
        """Tokens of a sequence behind its prompt."""
        return self.length - self.prompt

    def tokens(self) -> int:
        """Tokens of a step as the peers count them; where lengths are ragged the workers count real ones themselves.

        A prompt that two completions share counts once for each, whoever reads it once.
        """
        if self.task == "generate":
            return self.batch * self.response
        return self.batch * self.length * (2 if self.task in ("dpo", "reward") else 1)

    def flops(self, contender: str, lengths: list[int]) -> float:
        """Model FLOPs of a counted token: 6 N and attention, forward-only passes a third of it.

        What a contender need not do is left out: the head where no token is scored, a prompt's second reading where
        the two answers share a row, the last layer for tokens that nothing is read from. What it does beyond that
        (padding, recomputation) is not counted in its favour.

        Args:
          contender: by name.
          lengths: of the records, where they are ragged.
        """
        shares = is_ours(contender) and self.task in ("dpo", "reward")
        forward = lambda sequences, head=True: _forward(self.shape, sequences, head)  # noqa: E731
        tokens, prompt, response = self.length, self.prompt, self.response
        if self.task == "sft":
            records = lengths if self.ragged else [tokens]
            passes = 3 if not self.rank or contender == "jaxalign-full" else 2  # no gradients of frozen kernels
            return passes * forward([(n, n) for n in records]) / sum(records)
        if self.task in ("dpo", "reward"):
            once = forward([(tokens, response)] * 2, self.task == "dpo")
            if shares:
                row, read = prompt + 2 * response, 2 * response if self.task == "dpo" else 2
                once -= forward([(prompt, 0)]) + _unread(self.shape, row, read)
            passes = 4 if self.reference == "live" else 3
            return passes * once / (2 * tokens)
        read = forward([(tokens, response)])
        if self.task == "generate":
            return read / response
        value = forward([(tokens, response)], head=False)
        if is_ours(contender):
            read, value = (x - _unread(self.shape, tokens, response) for x in (read, value))
        # Rollout, reference, value and reward read each sequence; then policy and value model learn from it.
        return (2 * read + 2 * value + self.epochs * 3 * (read + value)) / tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def _unread(shape: Shape, tokens: int, read: int) -> float:
    """FLOPs of the last layer that a row is spared where layers are few and few of its tokens are read, on a CPU
    (`models/transformer.py`): queries, outputs and mlp of the others."""
    few = shape.layers <= 8 and 4 * read <= 3 * tokens
    return 2.0 * shape.hidden * (2 * shape.hidden + 3 * shape.ffn) * (tokens - read) * few


def _forward(shape: Shape, sequences: Sequences, head: bool = True) -> float:
    """FLOPs of reading causal sequences once; the lookup of embeddings is no product."""
    size = shape.hidden // shape.heads
    attention = shape.hidden * size * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.ffn
    total = 0.0
    for tokens, scored in sequences:
        total += 2 * shape.layers * layer * tokens + 2 * shape.hidden * shape.vocab * scored * head
        total += 4 * shape.layers * shape.heads * size * tokens * (tokens + 1) / 2
    return total


TRL_TUNIX = ("jaxalign", "trl", "tunix")
_WIDE = Shape(hidden=512, heads=8, kv_heads=8, ffn=1376)
_SHARES = {"1/4": 64, "1/2": 128, "3/4": 192}

CASES: tuple[Case, ...] = (
    Case("sft-padded", "sft", TRL_TUNIX),
    Case("sft-ragged", "sft", ("jaxalign", "trl", "trl-packed", "trl-wrapped"), ragged=True),
    Case("sft-adapter", "sft", ("jaxalign", "jaxalign-full", "trl"), _WIDE, rank=8, steps=4),
    *(
        Case(f"dpo-live-{share}", "dpo", TRL_TUNIX, prompt=prompt, reference="live", steps=4)
        for share, prompt in _SHARES.items()
    ),
    *(
        Case(f"dpo-cached-{share}", "dpo", ("jaxalign", "trl"), prompt=prompt, reference="cached", steps=4, batches=24)
        for share, prompt in _SHARES.items()
    ),
    Case("reward-1/2", "reward", ("jaxalign", "trl"), prompt=128, steps=4),
    Case("ppo", "ppo", ("jaxalign", "trl-1.12"), batch=16, length=128, prompt=64, steps=1, batches=16),
    Case(
        "generate",
        "generate",
        ("jaxalign", "transformers-static", "transformers-dynamic"),
        batch=16,
        length=256,
        prompt=128,
        ragged=True,
        steps=2,
        batches=4,
    ),
    Case(
        "memory-128k",
        "sft",
        ("jaxalign", "trl", "trl-1.12-unchunked"),
        Shape(vocab=128 * 1024),
        batch=1,
        length=2048,
        steps=1,
        batches=8,
        alone=True,
    ),
)


def toy(case: Case) -> Case:
    """The same case at a size at which every contender starts, steps and stops within seconds."""
    length = 32
    return dataclasses.replace(
        case,
        shape=Shape(hidden=32, layers=2, heads=2, kv_heads=2, ffn=64, vocab=1024 if case.alone else 128),
        batch=4,
        length=length,
        prompt=case.prompt * length // case.length,
        steps=2,
        batches=8,
        epochs=2,
    )


# One prompt share is enough to see that everything still runs.
SMOKE = tuple(toy(c) for c in CASES if not c.name.endswith(("1/4", "3/4")))


def chosen(names: str | None, smoke: bool) -> list[Case]:
    """The cases of a comma-separated list, all where it is None; a name stands for all that begin with it.

    Raises:
      SystemExit: for a name that no case has.
    """
    cases = SMOKE if smoke else CASES
    if names is None:
        return list(cases)
    found = []
    for name in names.split(","):
        matching = [c for c in cases if c.name == name] or [c for c in cases if c.name.startswith(name)]
        if not matching:
            raise SystemExit(f"found:    case {name}\nexpected: {', '.join(c.name for c in cases)}\nfix:      --cases")
        found += [c for c in matching if c not in found]
    return found

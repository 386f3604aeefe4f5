"""Generation at real shapes: tokens/s, and the share of the floor that reading weights and cache once a step sets."""

from part import (
    CEILINGS,
    MODELS,
    OPTIONS,
    SMOKE,
    emit,
    guarded,
    model_of,
    peak_gib,
    random_weights,
    seconds_of,
    stand_in_for_chex,
    time_for,
)

stand_in_for_chex()

import gc  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from batches import prompts  # noqa: E402
from predicted import Recorded, beside  # noqa: E402

from jaxalign.rollout import driver, slots  # noqa: E402
from jaxalign.rollout.continuous import roll_out  # noqa: E402
from jaxalign.rollout.sampling import Sampling  # noqa: E402
from jaxalign.rollout.slots import prefill  # noqa: E402

PROMPT, NEW = (8, 8) if SMOKE else (512, 512)
BATCHES = (4,) if SMOKE else (16, 64, 1, 256)


def floor(name: str, batch: int) -> float | None:
    """Least seconds of decoding: the weights and the cache so far, read once for each token, in bfloat16."""
    if not CEILINGS.get("bytes"):
        return None
    m, model = MODELS[name], model_of(name)
    weights = 2 * sum(x.size for x in jax.tree.leaves(model.abstract()))
    if not m["tie_word_embeddings"]:
        weights -= 2 * m["vocab_size"] * m["hidden_size"]  # of the embedding a few rows are read
    token = 2 * 2 * m["num_hidden_layers"] * m["num_key_value_heads"] * m["head_dim"]
    seen = sum(PROMPT + i for i in range(1, NEW))
    return ((NEW - 1) * weights + batch * token * seen) / CEILINGS["bytes"]


def measure(name: str, model, params, batch: int) -> None:
    made = prompts(model.config.vocab_size, rows=batch, length=PROMPT)
    ids, key = np.arange(batch, dtype=np.int32), jax.random.key(0)
    rows = jax.device_put(made.rows)
    # No token ends a row: all have their full length.
    options = {"sampling": Sampling(1.0, NEW), "stop_ids": (-1,)}
    program = prefill.lower(model, params, rows).compile()
    reading = seconds_of(lambda: program(params, rows), jax.block_until_ready, at_most=1.0, calls=5)
    expected = beside(reading, (program, 1))
    emit(f"{name}, prefill of {batch} x {PROMPT}", batch * PROMPT / reading, "tokens/s", **expected)
    driver.advance = advance = Recorded(slots.advance)
    whole = seconds_of(
        lambda: roll_out(model, params, rows, key, ids, **options), jax.block_until_ready, at_most=6.0, calls=3
    )
    driver.advance = slots.advance
    once = options | {"sampling": Sampling(1.0, 1)}
    read = seconds_of(
        lambda: roll_out(model, params, rows, key, ids, **once), jax.block_until_ready, at_most=1.0, calls=3
    )
    least = floor(name, batch)
    decode, token = whole - read, 1e3 * (whole - read) / (NEW - 1)
    emit(
        f"{name}, batch {batch}, {PROMPT} + {NEW}",
        batch * NEW / whole,
        "tokens/s",
        share=None if least is None or decode <= 0 else least / decode,
        gib=peak_gib(),
        note=f"share of the memory floor; first token {1e3 * read:.0f} ms, each other {token:.2f} ms",
    )
    if decode > 0:
        expected = beside(decode / (NEW - 1), *decoding(advance))
        emit(f"{name}, batch {batch}, {PROMPT} + {NEW}: another token", token, "ms", **expected)


def decoding(advance: Recorded) -> list[tuple[Any, float]]:
    """The programs of a completion's tokens but the first, one for each width of the cache, and the share of each."""
    of_width = {args[2].cache.keys[0].shape[-2]: (args, static) for args, static in advance.calls}
    (first, n), *others = driver.cache_widths(PROMPT, NEW)
    return [(advance.program(*of_width[width]), n / (NEW - 1)) for width, n in ((first, n - 1), *others)]


def main() -> None:
    name = OPTIONS["model"]
    model = model_of(name, param_dtype="bfloat16")
    params = random_weights(model.abstract())
    for batch in BATCHES:
        case = f"{name}, batch {batch}"
        if time_for(case, 20):
            with guarded(case):
                measure(name, model, params, batch)
            gc.collect()


if __name__ == "__main__":
    main()

"""Fixed prompts for greedy decoding, and what this package makes of them."""

import json
import os
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "generate_greedy.json"
MODELS = ("stories260k-llama", "stories3m-llama")
NEW_TOKENS = 64
PROMPTS = (
    "Once upon a time",
    "Lily and Tom went to the park.",
    "The dog",
    "One day, a little girl named Sue found a shiny key in the garden. She took it to her mom and",
    "",
    "They hugged and laughed, and they were best friends. The end.",
)


def ours(shared, name):
    """Tokens of each prompt's greedy completion, stop token included."""
    from jaxalign.models import hf
    from jaxalign.models.tokenizer import load_tokenizer, stop_ids
    from jaxalign.rollout.engine import Generator
    from jaxalign.rollout.sampling import Sampling

    path = shared / "models" / name
    model, params = hf.load(path, dtype="float32", param_dtype="float32", remat="none")
    tokenizer = load_tokenizer(path)
    generator = Generator(
        model,
        params,
        tokenizer,
        stop_ids=stop_ids(path, tokenizer),
        sampling=Sampling(0.0, NEW_TOKENS),
        batch_size=4,
    )
    return generator(PROMPTS, seed=0)


def golden(name, values=None):
    """The stored tokens; stores new ones where JAXALIGN_UPDATE_GOLDEN=1."""
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if values is not None and os.environ.get("JAXALIGN_UPDATE_GOLDEN") == "1":
        stored[name] = values
        GOLDEN.write_text(json.dumps(stored, sort_keys=True) + "\n")
    return stored[name]

"""jaxalign's generation from token ids, greedy, each completion of full length."""

from turns import Turns

turns = Turns()

import jax  # noqa: E402

turns.count_compilation()

from jaxalign.models import hf  # noqa: E402
from jaxalign.models.tokenizer import load_tokenizer  # noqa: E402
from jaxalign.rollout.engine import Generator  # noqa: E402
from jaxalign.rollout.sampling import Sampling  # noqa: E402

turns.imported("jaxalign", "jax", "jaxlib", "flax")


def main() -> None:
    case, path = turns.case, f"{turns.directory}/model"
    options = {"dtype": "float32", "param_dtype": "float32", "remat": "none", "head": "lm"}
    model, params = hf.from_scratch(path, key=jax.random.key(0), **options)
    generate = Generator(
        model,
        params,
        load_tokenizer(path),
        stop_ids=(),
        sampling=Sampling(0.0, case["length"] - case["prompt"]),
        batch_size=case["batch"],
    )
    prompts = [record["ids"] for record in turns.records()]
    batches = [prompts[i : i + case["batch"]] for i in range(0, len(prompts), case["batch"])]
    made, step = 0, 0
    while True:
        made += sum(len(c.ids) for c in generate.continue_ids(batches[step % len(batches)], seed=0))
        step += 1
        turns.after_step(step, lambda: made)  # noqa: B023  called at once


main()

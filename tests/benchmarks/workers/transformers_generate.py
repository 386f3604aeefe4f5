"""`transformers.generate`, greedy, from left-padded prompts, each completion of full length."""

from turns import Turns

turns = Turns()

import torch  # noqa: E402

torch.set_num_threads(turns.threads)

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

turns.imported("transformers", "torch")


def main() -> None:
    case = turns.case
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(f"{turns.directory}/model")).eval()
    kind = {"cache_implementation": "static"} if turns.options["cache"] == "static" else {}
    prompts = [record["ids"] for record in turns.records()]
    response = case["length"] - case["prompt"]
    made, step = 0, 0
    while True:
        start = step * case["batch"] % len(prompts)
        rows = prompts[start : start + case["batch"]]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=response, eos_token_id=None, **kind
            )
        made += out.shape[0] * (out.shape[1] - width)
        step += 1
        turns.after_step(step, lambda: made)  # noqa: B023  called at once


main()

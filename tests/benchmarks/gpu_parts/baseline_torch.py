"""The same shapes in torch: transformers' Llama with SDPA attention, bfloat16, fused AdamW; no jax here."""

from part import MODELS, SMOKE, emit, guarded, need, seconds_of, shape_of, share, time_for

need("torch", "transformers")

import copy  # noqa: E402
import gc  # noqa: E402

import torch  # noqa: E402
from harness.cases import Case  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, NEW = (8, 8) if SMOKE else (512, 512)
# (model, task, rows, length, float32 weights under autocast, recomputes, compiled); by what is most wanted.
RUNS = (
    ("1B", "sft", 16, 2048, True, False, False),
    ("1B", "dpo", 8, 2048, False, False, False),
    ("1B", "sft", 16, 2048, False, False, False),
    ("8B", "sft", 8, 2048, False, True, False),
    ("1B", "sft", 16, 2048, False, False, True),
    ("1B", "sft", 4, 8192, False, True, False),
    ("8B", "dpo", 4, 2048, False, True, False),
)


def wait(_) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make(name: str, dtype: torch.dtype):
    config = LlamaConfig(**{k: v for k, v in MODELS[name].items() if k not in ("model_type", "architectures")})
    config._attn_implementation = "sdpa"
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(dtype)


def completion_logprobs(model, tokens, start: int):
    """Summed log-probs of the tokens from `start` on; logits of those alone."""
    logits = model(tokens, logits_to_keep=tokens.shape[1] - start + 1).logits[:, :-1]
    return torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, start:, None])[..., 0].sum(-1)


def measure(
    case: str, name: str, task: str, rows: int, length: int, mixed: bool, recompute: bool, compiled: bool
) -> None:
    model = make(name, torch.float32 if mixed else torch.bfloat16)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    model.train()
    reference = copy.deepcopy(model).to(torch.bfloat16).eval().requires_grad_(False) if task == "dpo" else None
    read = torch.compile(model) if compiled else model
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=DEVICE == "cuda")
    vocab, half = MODELS[name]["vocab_size"], length // 2
    tokens = torch.randint(3, vocab, (rows * (2 if task == "dpo" else 1), length), device=DEVICE)

    def loss():
        if task == "sft":
            return read(tokens, labels=tokens).loss
        with torch.no_grad():
            before = completion_logprobs(reference, tokens, half)
        chosen, rejected = (completion_logprobs(read, tokens, half) - before).chunk(2)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return value

    taken = seconds_of(step, wait, at_most=4.0, calls=8)
    prompt = 0 if task == "sft" else half
    what = Case("", task, (), shape_of(name), rows, length, prompt, "live" if task == "dpo" else "")
    tokens_due = what.tokens()
    tflops = 1e-12 * tokens_due * what.flops("torch", []) / taken
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    emit(case, tokens_due / taken, "tokens/s", tflops=tflops, share=share(tflops), gib=memory, step_ms=1e3 * taken)


def generation(name: str, batch: int) -> None:
    model = make(name, torch.bfloat16).eval()
    tokens = torch.randint(3, MODELS[name]["vocab_size"], (batch, PROMPT), device=DEVICE)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    # One call of a loop in Python takes long, and is warm from its second token on.
    taken = seconds_of(run, wait, at_most=0.1, calls=2)
    emit(f"torch {name}, generate, batch {batch}, {PROMPT} + {NEW}", batch * NEW / taken, "tokens/s")


def main() -> None:
    emit("torch", note=f"{torch.__version__} on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'the CPU'}")
    for run in RUNS[:2] if SMOKE else RUNS:
        name, task, rows, length, mixed, recompute, compiled = run
        if SMOKE:
            rows, length = 2, 32
        weights = "float32 weights, autocast" if mixed else "bf16 weights and moments"
        case = f"torch {name} {task.upper()}, {rows} x {length}, {weights}"
        case += ", recomputing" * recompute + ", compiled" * compiled
        if time_for(case, 40 if compiled else 12):
            with guarded(case):
                measure(case, name, task, rows, length, mixed, recompute, compiled)
            free()
    for name, batch in (("1B", 16),) if SMOKE else (("1B", 16), ("1B", 64)):
        case = f"torch {name}, generate, batch {batch}"
        if time_for(case, 40):
            with guarded(case):
                generation(name, batch)
            free()


if __name__ == "__main__":
    main()

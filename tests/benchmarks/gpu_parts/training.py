"""Training steps at real shapes with random weights: tokens/s, model TFLOP/s, share of the ceiling, memory."""

from part import (
    OPTIONS,
    SMOKE,
    emit,
    guarded,
    left,
    model_of,
    random_weights,
    seconds_of,
    shape_of,
    share,
    stand_in_for_chex,
    time_for,
)

stand_in_for_chex()

import dataclasses  # noqa: E402
import gc  # noqa: E402
import types  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from batches import pairs, texts  # noqa: E402
from harness.cases import Case  # noqa: E402
from predicted import beside, seen_share  # noqa: E402

from jaxalign.parallel.mesh import make_mesh  # noqa: E402
from jaxalign.steps.preference import preference_objective, sequence_logprobs  # noqa: E402
from jaxalign.steps.reward import reward_objective  # noqa: E402
from jaxalign.steps.sft import sft_objective  # noqa: E402
from jaxalign.steps.step import make_train_step  # noqa: E402
from jaxalign.train.compiled import Compiled  # noqa: E402
from jaxalign.train.optimizer import make_optimizer  # noqa: E402
from jaxalign.types import TrainState  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Run:
    """One step that is timed."""

    model: str
    task: str
    rows: int
    length: int
    remat: str = "full"
    reference: str = ""  # dpo
    shared: bool = True  # pairs: their prompt, half of each sequence, stands in the row once
    param_dtype: str = "float32"
    state_dtype: str | None = None

    @property
    def name(self) -> str:
        if self.task == "forward":
            return f"{self.model} forward, pairs of {self.rows} x {self.length}"
        words = [self.model, self.task.upper() if self.task != "reward" else "reward"]
        words += [self.reference] if self.reference else []
        words += [] if self.task == "sft" else ["shared" if self.shared else "prompt twice"]
        kept = {"float32": "", "bfloat16": ", bf16 weights"}[self.param_dtype]
        kept += ", bf16 moments" if self.state_dtype else ""
        return f"{' '.join(words)}, {self.rows} x {self.length}, remat {self.remat}{kept}"


# By what is most wanted; what does not fit says so. Full training of the 8B shape: float32 weights and gradients of
# 32 GB each and moments of as much in bfloat16.
_BIG = {"state_dtype": "bfloat16"}
RUNS = {
    "1B": (
        Run("1B", "sft", 16, 2048, "dots"),
        Run("1B", "dpo", 8, 2048, "dots", reference="live"),
        Run("1B", "forward", 8, 2048),
        Run("1B", "sft", 4, 8192),
        Run("1B", "dpo", 8, 2048, "dots", reference="cached"),
        Run("1B", "dpo", 8, 2048, "dots", reference="cached", shared=False),
        Run("1B", "reward", 8, 2048, "dots"),
        Run("1B", "dpo", 2, 8192, reference="live"),
        Run("1B", "sft", 16, 2048, "full"),
        Run("1B", "dpo", 8, 2048, "dots", reference="live", shared=False),
        Run("1B", "reward", 2, 8192),
    ),
    "8B": (
        Run("8B", "sft", 8, 2048, **_BIG),
        Run("8B", "dpo", 4, 2048, reference="cached", **_BIG),
        Run("8B", "forward", 4, 2048, param_dtype="bfloat16"),
        Run("8B", "sft", 2, 8192, **_BIG),
        Run("8B", "dpo", 4, 2048, reference="live", **_BIG),
        Run("8B", "reward", 4, 2048, **_BIG),
        Run("8B", "sft", 8, 2048, param_dtype="bfloat16"),
        Run("8B", "dpo", 1, 8192, reference="cached", **_BIG),
    ),
}


def optimizer(run: Run):
    """AdamW as a stage makes it."""
    fields = {"name": "adamw", "schedule": "constant", "warmup_steps": 0, "final_fraction": 0.0, "b1": 0.9, "b2": 0.95}
    fields |= {"eps": 1e-8, "weight_decay": 0.0, "decay_mask": "matrices", "max_grad_norm": 1.0}
    return make_optimizer(types.SimpleNamespace(**fields, state_dtype=run.state_dtype, rate_factors=()), 1e-5, 1000)


def build(run: Run):
    """The step, its batch, and what makes its state and frozen models."""
    score = run.task == "reward"
    role = "reward" if score else "policy"
    model = model_of(run.model, param_dtype=run.param_dtype, remat=run.remat, head="score" if score else "lm")
    vocab = model.config.vocab_size
    if run.task == "sft":
        objective = sft_objective(model.apply, model.head)
        batch = texts(vocab, rows=run.rows, length=run.length)
    else:
        half = run.length // 2
        readout = "last" if score else "tokens"
        batch = pairs(vocab, rows=run.rows, length=run.length, prompt=half, shared=run.shared, readout=readout)
    if run.task == "dpo":
        options = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "reference": run.reference}
        objective = preference_objective(model.apply, model.head, **options)
    if score:
        options = {"label_smoothing": 0.0, "center_coef": 0.0, "use_margin": False}
        objective = reward_objective(model.apply, model.score_kernel, **options)
    tx = optimizer(run)

    reference = {"ref": model_of(run.model, param_dtype="bfloat16").abstract()} if run.reference == "live" else {}

    def start(params) -> TrainState:
        return TrainState(jnp.int32(0), {role: params}, {role: jax.jit(tx.init)(params)}, {}, jnp.int32(0))

    return make_train_step(objective, {role: tx}), batch, start, model.abstract(), reference


def flops_of(run: Run) -> tuple[int, float]:
    """Tokens of a step as the peers count them, and the model FLOPs that the step needs."""
    prompt = 0 if run.task == "sft" else run.length // 2
    who = "jaxalign" if run.shared else "another"
    task = "dpo" if run.task == "forward" else run.task
    case = Case("", task, (), shape_of(run.model), run.rows, run.length, prompt, run.reference)
    return case.tokens(), case.tokens() * case.flops(who, []) / (3 if run.task == "forward" else 1)


def row(run: Run, taken: float, compiled: Compiled, program, rows, **more) -> None:
    """A row of the table, with what is predicted of the program."""
    tokens, flops = flops_of(run)
    tflops, memory = 1e-12 * flops / taken, compiled.memory
    more |= {"gib": memory["total"] / 2**30} if memory else {}
    more |= {"note": f"compiled in {compiled.compile_seconds:.0f} s", "step_ms": 1e3 * taken}
    expected = beside(taken, (program, 1), visible=seen_share(rows))
    emit(run.name, tokens / taken, "tokens/s", tflops=tflops, share=share(tflops), **more, **expected)


def forward(run: Run) -> None:
    """Log-probs of pairs, as the reference's pass computes them."""
    model = model_of(run.model, param_dtype=run.param_dtype)
    batch = pairs(model.config.vocab_size, rows=run.rows, length=run.length, prompt=run.length // 2, shared=run.shared)
    compiled = Compiled(lambda params, batch: sequence_logprobs(model.apply, model.head, params, batch), "forward")
    params, given = random_weights(model.abstract()), jax.device_put(batch)
    program = compiled.compile(params, given)
    taken = seconds_of(lambda: compiled(params, given), jax.block_until_ready, at_most=3.0, calls=8)
    row(run, taken, compiled, program, batch.rows)


def measure(run: Run) -> None:
    step, batch, start, model, reference = build(run)
    compiled = Compiled(step, "train step", donate=(0,))
    given = jax.device_put(batch)
    # Says in words where it cannot fit, before anything is allocated.
    program = compiled.compile(jax.eval_shape(start, model), reference, given)
    state, others = start(random_weights(model)), {role: random_weights(m) for role, m in reference.items()}
    last = {}

    def once():
        nonlocal state
        state, metrics = compiled(state, others, given)
        last.update(metrics)
        return metrics

    taken = seconds_of(once, lambda m: jax.block_until_ready((m, state)), at_most=4.0, calls=8)
    row(run, taken, compiled, program, batch.rows, ok=bool(np.isfinite(float(last["loss"]))))


def main() -> None:
    runs = RUNS[OPTIONS["model"]]
    for run in (runs[1:2] if OPTIONS["model"] == "8B" else (runs[0], runs[1], runs[2], runs[6])) if SMOKE else runs:
        if SMOKE:
            run = dataclasses.replace(run, rows=2, length=64 if run.length > 4096 else 32)
        if time_for(run.name, 25) and left() > 0:
            with guarded(run.name):
                (forward if run.task == "forward" else measure)(run)
            gc.collect()  # so that the next one finds the memory free


if __name__ == "__main__":
    # As a stage runs it: under a mesh, here of one device.
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        main()

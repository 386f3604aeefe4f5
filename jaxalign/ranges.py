"""What each field of a configuration may hold: tables that `jaxalign.config.validate` reads."""

from __future__ import annotations

ALGORITHMS = ("sft", "reward", "dpo", "ppo")
REQUIRED = ("workdir", "model.path", "data.sources")  # these have no default

# (field, allowed values)
CHOICES: tuple[tuple[str, tuple], ...] = (
    ("algorithm.name", ALGORITHMS),
    ("algorithm.loss", ("sigmoid", "ipo")),
    ("algorithm.reference", ("live", "cached")),
    ("algorithm.kl_estimator", ("k1", "k2", "k3")),
    ("model.dtype", ("float32", "bfloat16", "float16", "float64")),
    ("model.param_dtype", ("float32", "bfloat16", "float64")),
    ("model.frozen_dtype", (None, "float32", "bfloat16", "float16", "float64")),
    ("model.remat", ("none", "dots", "offload", "full")),
    ("model.attention", (None, "blocked", "splash", "triton", "mosaic")),
    ("data.on_error", ("stop", "skip")),
    ("data.truncation", ("drop", "keep_start", "keep_end")),
    ("data.train_on", ("completion", "all")),
    ("optimizer.name", ("adamw", "adafactor", "lion", "sgd")),
    ("optimizer.schedule", ("constant", "linear", "cosine")),
    ("optimizer.decay_mask", ("matrices", "all")),
    ("optimizer.state_dtype", (None, "float32", "bfloat16", "int8")),
    ("checkpoint.best_mode", ("min", "max")),
)

# (field, least, greatest); a bound of None is open, and None values pass
BOUNDS: tuple[tuple[str, float | None, float | None], ...] = (
    ("batch_size", 1, None),
    ("grad_accum_steps", 1, None),
    ("profile", 0, None),
    ("num_train_steps", 1, None),
    ("num_epochs", 1, None),
    ("data.max_length", 2, None),
    ("data.max_prompt_length", 1, None),
    ("data.max_completion_length", 1, None),
    ("data.row_length", 2, None),
    ("data.max_records", 1, None),
    ("data.max_skipped", 0, 1),
    ("data.eval_fraction", 0, 0.9),
    ("optimizer.learning_rate", 0, None),
    ("optimizer.value_learning_rate", 0, None),
    ("optimizer.warmup_steps", 0, None),
    ("optimizer.max_grad_norm", 0, None),
    ("optimizer.weight_decay", 0, None),
    ("optimizer.final_fraction", 0, 1),
    ("algorithm.beta", 1e-9, None),
    ("algorithm.label_smoothing", 0, 0.4999),
    ("algorithm.center_coef", 0, None),
    ("algorithm.kl_coef", 0, None),
    ("algorithm.kl_target", 1e-9, None),
    ("algorithm.kl_horizon", 1, None),
    ("algorithm.gamma", 0, 1),
    ("algorithm.gae_lambda", 0, 1),
    ("algorithm.clip_range", 1e-9, None),
    ("algorithm.value_clip_range", 1e-9, None),
    ("algorithm.num_ppo_epochs", 1, None),
    ("algorithm.num_minibatches", 1, None),
    ("algorithm.max_approx_kl", 1e-9, None),
    ("rollout.max_new_tokens", 1, None),
    ("rollout.num_samples", 1, None),
    ("rollout.temperature", 0, None),
    ("rollout.top_k", 0, None),
    ("rollout.top_p", 1e-9, 1),
    ("rewards.clip", 1e-9, None),
    ("eval.every", 0, None),
    ("eval.num_batches", 1, None),
    ("checkpoint.every", 0, None),
    ("checkpoint.keep", 1, None),
    ("logging.every", 1, None),
    ("logging.samples_every", 0, None),
    ("logging.num_samples", 1, None),
)

# (algorithm, field, least, greatest): what practitioners' guides give; outside it is a warning, not an error
GUIDE_RANGES: tuple[tuple[str, str, float, float], ...] = (
    ("sft", "optimizer.learning_rate", 1e-7, 1e-2),  # 1e-2: small models from scratch; others start at 2e-5
    ("reward", "optimizer.learning_rate", 1e-7, 1e-2),
    ("dpo", "algorithm.beta", 0.05, 0.5),
    ("dpo", "optimizer.learning_rate", 5e-7, 5e-6),
    ("dpo", "num_epochs", 1, 1),
    ("ppo", "optimizer.learning_rate", 1e-8, 1e-2),
    ("ppo", "algorithm.clip_range", 0.1, 0.2),
    ("ppo", "algorithm.gae_lambda", 0.95, 0.95),
)

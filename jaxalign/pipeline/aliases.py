"""Field names and values of other programs (TRL, transformers, axolotl, OpenRLHF, Tunix), translated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxalign.config import get

# Another program's name: the field here; of several fields the first that the configuration has.  A name with a dot
# stands for itself alone, one without also for the last part of a dotted name.
ALIASES: dict[str, tuple[str, ...]] = {
    alias: tuple(fields.split())
    for aliases, fields in (
        ("output_dir save_dir logdir save_path ckpt_path ckpt.path checkpoint_root_directory", "workdir"),
        ("per_device_train_batch_size micro_batch_size train_batch_size global_batch_size bs", "batch_size"),
        ("gradient_accumulation_steps accumulation_steps accumulate_grad_batches", "grad_accum_steps"),
        ("micro_train_batch_size train.micro_batch_size", "grad_accum_steps"),
        ("num_train_epochs epochs max_epochs n_epochs", "num_epochs"),
        ("max_steps num_steps total_steps total_episodes", "num_train_steps"),
        (
            "model_name_or_path model_name pretrained_model_name_or_path sft_model_path base_model pretrain",
            "model.path",
        ),
        ("adapter_name_or_path", "model.path"),
        ("model model.name model.model model.dir model.directory model.id", "model.path"),
        ("tokenizer_name tokenizer_name_or_path", "model.tokenizer"),
        ("bf16 fp16 torch_dtype precision mixed_precision compute_dtype ds.param_dtype param_dtype", "model.dtype"),
        ("gradient_checkpointing gradient_checkpointing_enable activation_checkpointing", "model.remat"),
        ("attn_implementation flash_attention", "model.attention"),
        ("dataset_name dataset datasets train_file train_files train_dataset data_path", "data.sources"),
        ("data data.path data.paths data.file data.files data.train data.source data.train_sources", "data.sources"),
        ("prompt_data prompt_dataset", "data.sources"),
        ("eval_dataset eval.dataset eval_file data.eval data.eval_path data.validation", "data.eval_sources"),
        ("train_on_inputs", "data.train_on"),
        ("sample_packing packing_samples", "data.packing"),
        ("test_size val_size val_set_size eval_split validation_split", "data.eval_fraction"),
        ("max_seq_length max_seq_len seq_len seq_length sequence_length sequence_len", "data.max_length"),
        ("context_length cutoff_len max_len", "data.max_length"),
        ("max_completion_length max_target_length", "data.max_completion_length rollout.max_new_tokens"),
        ("response_length max_response_length", "data.max_completion_length rollout.max_new_tokens"),
        ("max_tokens max_tokens_to_generate", "rollout.max_new_tokens data.max_completion_length"),
        ("max_prompt_length max_input_length", "data.max_prompt_length"),
        ("truncation_mode", "data.truncation"),
        ("lr optimizer.lr peak_lr policy_lr actor_lr", "optimizer.learning_rate"),
        ("critic_lr value_lr", "optimizer.value_learning_rate"),
        ("lr_scheduler_type lr_scheduler scheduler lr_schedule", "optimizer.schedule"),
        ("warmup_ratio lr_warmup_ratio warmup num_warmup_steps", "optimizer.warmup_steps"),
        ("min_lr min_lr_ratio", "optimizer.final_fraction"),
        ("optim optimizer.type", "optimizer.name"),
        ("adam_beta1 beta1", "optimizer.b1"),
        ("adam_beta2 beta2", "optimizer.b2"),
        ("adam_epsilon", "optimizer.eps"),
        ("epsilon", "algorithm.clip_range optimizer.eps"),
        ("gradient_clipping grad_clip max_norm gradient_clip_val", "optimizer.max_grad_norm"),
        ("wd l2", "optimizer.weight_decay"),
        ("loss_type ipo ipo_enable", "algorithm.loss"),
        ("dpo_beta", "algorithm.beta"),
        ("gamma", "algorithm.gamma algorithm.simpo_gamma"),
        ("precompute_ref_log_probs", "algorithm.reference"),
        ("ref_model ref_model_path ref_model_name_or_path reference_model", "algorithm.reference_path"),
        ("ref.model_name_or_path ref_pretrain", "algorithm.reference_path"),
        ("kl_penalty init_kl_coef algo.kl.init_coef kl_beta kl_coeff", "algorithm.kl_coef"),
        ("target_kl", "algorithm.max_approx_kl"),
        ("cliprange clip_eps eps_clip clip_epsilon clip_ratio", "algorithm.clip_range"),
        ("cliprange_value clip_range_value value_clip vf_clip", "algorithm.value_clip_range"),
        ("lam lambda lambd gae", "algorithm.gae_lambda"),
        ("ppo_epochs noptepochs num_policy_updates num_iterations", "algorithm.num_ppo_epochs"),
        ("num_mini_batches mini_batch_size", "algorithm.num_minibatches"),
        ("center_rewards_coefficient", "algorithm.center_coef"),
        ("value_model value_model_path critic critic_path", "algorithm.value_path"),
        ("critic.model_name_or_path critic_pretrain", "algorithm.value_path"),
        ("adam_offload ref_offload ref.offload", "algorithm.offload"),
        ("reward_model reward_model_path rewards.path reward.model_name_or_path reward_pretrain", "rewards.model"),
        ("reward_funcs reward_fn reward_function reward.remote_url remote_rm_url", "rewards.function"),
        ("whiten_rewards", "rewards.whiten"),
        ("stop_token stop_sequences stop_strings eos", "rollout.stop"),
        ("num_generations num_return_sequences n_samples n_samples_per_prompt group_size", "rollout.num_samples"),
        ("eval_steps eval.steps evaluation_strategy eval_strategy eval_every eval_interval", "eval.every"),
        ("eval_every_n_steps", "eval.every"),
        ("save_steps save_strategy save_every save_interval checkpoint_every", "checkpoint.every"),
        ("save_total_limit max_ckpt_num ckpt.max_num", "checkpoint.keep"),
        ("metric_for_best_model load_best_model_at_end", "checkpoint.best_metric"),
        ("greater_is_better", "checkpoint.best_mode"),
        ("resume_from_checkpoint load_checkpoint ckpt.load_enable", "checkpoint.resume"),
        ("logging_steps log_every log_interval", "logging.every"),
        ("report_to wandb tensorboard logging.tensorboard logging.wandb", "logging.trackers"),
        ("wandb_name wandb_run_name logging.name", "logging.run_name"),
        ("wandb_project project_name logging.wandb_project", "logging.project"),
        ("num_sample_generations sample_every", "logging.samples_every"),
        ("lora_r lora_rank lora.r lora.rank peft.r peft_r use_peft use_lora lora", "adapter.rank"),
        ("lora_alpha lora.alpha peft.alpha", "adapter.alpha"),
        ("lora_target_modules target_modules lora_target lora_target_linear lora.target_modules", "adapter.targets"),
        ("lora_modules_to_save modules_to_save trainable_layers freeze_trainable_layers", "model.train"),
        ("use_rslora peft_use_rslora", "adapter.rslora"),
        ("use_dora peft_use_dora", "adapter.dora"),
        ("load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant", "model.frozen_dtype"),
        ("bnb_4bit_use_double_quant bits quantization_bit quantization", "model.frozen_dtype"),
        ("bnb_4bit_compute_dtype", "model.dtype"),
        ("loraplus_lr_ratio loraplus_ratio", "optimizer.rate_factors"),
        ("apply_chat_template_kwargs", "data.chat_template_kwargs"),
        ("tp tensor_parallel tensor_parallel_size ds_tensor_parallel_size", "mesh.tensor"),
        ("zero_stage fsdp_config deepspeed", "mesh.fsdp"),
        ("dp data_parallel data_parallel_size", "mesh.data"),
    )
    for alias in aliases.split()
}

# What other programs have and no field here is: a sentence of it, and what to do. A name without a dot stands for the
# last part of a dotted name too.
ABSENT: dict[str, tuple[str, str]] = {
    name: told
    for names, told in (
        (
            "lora_dropout lora.dropout peft.dropout dropout attention_dropout resid_pdrop hidden_dropout",
            (
                "nothing is dropped out here, in adapters or elsewhere",
                "against overfitting: fewer epochs, checkpoint.patience, a smaller adapter.rank",
            ),
        ),
        (
            "rpo_alpha cpo_alpha orpo_alpha loss_weights nll_loss_coef dpo_loss_weights",
            (
                "further losses stand in algorithm.extra_losses, each with its weight",
                "--config.algorithm.extra_losses='((\"sft\", 1.0),)' adds the loss on chosen answers with weight 1",
            ),
        ),
        ("lora_task_type task_type peft.task_type", ("the algorithm says what a model is trained for", "")),
        ("lora_bias", ("an adapter has no biases of its own", "--config.model.train=bias trains those of the model")),
    )
    for name in names.split()
}

_DTYPES = {
    "bf16": "bfloat16", "bf16-mixed": "bfloat16", "fp16": "float16", "16-mixed": "float16", "half": "float16",
    "fp32": "float32", "32": "float32", "no": "float32", "float": "float32", "auto": "bfloat16",
}  # fmt: skip

# Values to translate, by alias; other values stay as they are, and None is left to the user.
_VALUES: dict[str, dict[str, str | None]] = {
    alias: values
    for aliases, values in (
        ("bf16", {"true": "bfloat16", "false": "float32"}),
        ("fp16", {"true": "float16", "false": "float32"}),
        ("torch_dtype precision mixed_precision compute_dtype ds.param_dtype param_dtype", _DTYPES),
        ("bnb_4bit_compute_dtype", _DTYPES),
        ("ipo ipo_enable", {"true": "ipo", "false": "sigmoid"}),
        ("train_on_inputs", {"true": "all", "false": "completion"}),
        (
            "gradient_checkpointing gradient_checkpointing_enable activation_checkpointing",
            {"true": "full", "false": "none"},
        ),
        ("precompute_ref_log_probs", {"true": "cached", "false": "live"}),
        ("metric_for_best_model", {"eval_loss": "eval/loss"}),
        ("greater_is_better", {"true": "max", "false": "min"}),
        ("load_best_model_at_end", {"true": "eval/loss", "false": "None"}),
        ("attn_implementation flash_attention", dict.fromkeys(("sdpa", "eager", "flash_attention_2", "true"), "None")),
        ("lr_scheduler_type lr_scheduler scheduler lr_schedule", {"constant_with_warmup": "constant"}),
        (
            "optim optimizer.type",
            dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
            | {"schedule_free_adamw": "schedule_free"},
        ),
        ("evaluation_strategy eval_strategy save_strategy", {"no": "0", "epoch": None, "steps": None}),
        ("report_to", {"none": "None", "all": "tensorboard,wandb"}),
        ("wandb logging.wandb", {"true": "wandb", "false": "tensorboard"}),
        ("tensorboard logging.tensorboard", {"true": "tensorboard", "false": "None"}),
        ("resume_from_checkpoint", {"none": "False"}),
        ("use_peft use_lora lora", {"true": "16", "false": "0"}),
        ("load_in_4bit", {"true": "nf4", "false": "None"}),
        ("bits quantization_bit", {"4": "nf4", "8": "int8"}),
        ("load_in_8bit", {"true": "int8", "false": "None"}),
        ("use_bnb_nested_quant bnb_4bit_use_double_quant", {"true": "nf4", "false": "nf4"}),
        ("bnb_4bit_quant_type", {"fp4": "nf4"}),
        ("lora_target_linear", {"true": "all-linear"}),
        ("lora_target", {"all": "all-linear"}),
    )
    for alias in aliases.split()
}

# Names that count something else there: a sentence on what the field counts, and the number where it can be computed.
_Told = Callable[[float, ConfigDict], float | None]
_COUNTS: dict[str, tuple[str, _Told]] = {
    alias: (note, number)
    for aliases, note, number in (
        (
            "per_device_train_batch_size micro_batch_size",
            "is global, over all devices and all grad_accum_steps: {value} x devices x accumulation",
            lambda n, c: n if c.grad_accum_steps == 1 else n * c.grad_accum_steps,
        ),
        (
            "gradient_accumulation_steps accumulation_steps accumulate_grad_batches",
            "is how many parts batch_size (now {batch_size}) is worked on in; it does not multiply it",
            lambda n, c: n,
        ),
        (
            "micro_train_batch_size train.micro_batch_size",
            "is how many parts batch_size (now {batch_size}) is worked on in: batch_size / {value} / devices",
            lambda n, c: None,
        ),
        (
            "zero_stage fsdp_config deepspeed",
            "is how many devices parameters are split over, which is all by default",
            lambda n, c: None,
        ),
        (
            "warmup_ratio lr_warmup_ratio",
            "counts steps: {value} x the run's steps, which --dry_run tells",
            lambda n, c: round(n * c.num_train_steps) if c.num_train_steps else None,
        ),
        (
            "total_episodes",
            "counts batches: {value} / batch_size (now {batch_size})",
            lambda n, c: max(1, int(n // c.batch_size)),
        ),
        (
            "mini_batch_size",
            "is how many minibatches a batch is made into: batch_size (now {batch_size}) / {value}",
            lambda n, c: max(1, int(c.batch_size // n)) if n else None,
        ),
        (
            "trainable_layers freeze_trainable_layers",
            "names what is trained: 'layers[-{value}:]' are the last {value} layers",
            lambda n, c: None,
        ),
        (
            "min_lr",
            "is a share of optimizer.learning_rate (now {learning_rate:g})",
            lambda n, c: float(f"{n / c.optimizer.learning_rate:g}") if c.optimizer.learning_rate else None,
        ),
    )
    for alias in aliases.split()
}


def meaning(alias: str, value: Any, section: ConfigDict) -> tuple[Any, str]:
    """Translates the value of another program's option.

    Args:
      alias: one of `ALIASES`, or any other name, whose value stays as it is.
      value: text of a flag, or of a config file whatever Python has.
      section: the stage's configuration.

    Returns:
      The value, None where the user must choose it, and a sentence where the field counts something else; "" else.

    >>> from jaxalign.config import defaults
    >>> meaning("bf16", "True", defaults("sft"))
    ('bfloat16', '')
    >>> meaning("min_lr", 2e-6, defaults("sft"))
    (0.1, 'is a share of optimizer.learning_rate (now 2e-05)')
    """
    text = str(value).strip().lower().removeprefix("torch.")
    if alias in _COUNTS:
        note, number = _COUNTS[alias]
        rate = get(section, "optimizer.learning_rate", 0.0)
        note = note.format(value=value, batch_size=get(section, "batch_size"), learning_rate=rate)
        try:
            return number(float(text), section), note
        except (ValueError, OverflowError, AttributeError, TypeError):  # no number, or a section that is none any more
            return None, note
    known = _VALUES.get(alias, {})
    return (known[text] if text in known else text if str(value).startswith("torch.") else value), ""

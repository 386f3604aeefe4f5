"""TRL 1.12's PPO trainer, the last there was; a callback takes the turns, a step is a whole iteration."""

from turns import Turns

turns = Turns()

import torch  # noqa: E402

torch.set_num_threads(turns.threads)

from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

turns.imported("trl", "torch", "transformers", "accelerate")


class Callback(TrainerCallback):
    """Ends a turn after its last iteration."""

    def on_step_end(self, args, state, control, **_):
        turns.after_step(state.global_step)


def main() -> None:
    case, path = turns.case, f"{turns.directory}/model"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, padding_side="left")
    tokenizer.eos_token = "</s>"  # the trainer counts it; without a stop token nothing ends by it
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(LlamaConfig.from_pretrained(path)) for _ in range(2))
    reward, value = (LlamaForSequenceClassification(LlamaConfig.from_pretrained(path, num_labels=1)) for _ in range(2))
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=turns.scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=case["batch"],
            gradient_accumulation_steps=1,
            num_mini_batches=case["minibatches"],
            num_ppo_epochs=case["epochs"],
            total_episodes=case["batch"] * 10**6,
            response_length=case["length"] - case["prompt"],
            stop_token=None,
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": [r["ids"] for r in turns.records()]}),
        callbacks=[Callback()],
    )
    trainer.train()


main()

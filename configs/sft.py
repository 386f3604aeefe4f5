r"""Supervised fine-tuning of Llama-3.1-8B on UltraChat.

paper     Direct Preference Optimization, arXiv 2305.18290, section 4: both roads start from an SFT model; the recipe is
          that of Zephyr, arXiv 2310.16944, as SimPO ran it on Llama-3-8B, arXiv 2405.14734, appendix D
command   bash launch/gpu_node.sh --config=configs/sft.py
          bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-16 -- --config=configs/sft.py \
               --config.workdir=gs://BUCKET/llama3_8b/sft
first     HF_TOKEN of an account that has accepted the licence of Llama 3.1; the same command with --dry_run
hardware  one node of 8 H100-80GB, or a TPU slice v5p-16: 8 chips of 95 GiB on 2 hosts
memory    each device holds 11.2 GiB (float32 weights 3.7, Adam 7.5); a step takes 70 GiB on an H100 and 74 on
          a v5p chip, gradients and activations included (compiled for both by `jaxalign plan`, not run there)
time      about 45 min on 8 H100 (2.64 s a step, MFU 60 %), 80 min on v5p-16 (4.78 s, 72 %): 250 M tokens, as
          `jaxalign plan` predicts where products reach 75 and 90 % of the peak
numbers   literature, Llama-3-8B by the same recipe: AlpacaEval 2 length-controlled 6.2 %, Arena-Hard 3.3
          (github.com/princeton-nlp/SimPO); of this config: not yet measured
"""

from jaxalign.config import defaults


def get_config():
    """The stage, for 8 devices of 80 GB or more."""
    config = defaults("sft")
    config.workdir = "runs/llama3_8b/sft"
    config.model.path = "meta-llama/Llama-3.1-8B"
    config.model.tokenizer = "meta-llama/Llama-3.1-8B-Instruct"  # the same tokens, and a chat template
    config.model.dtype = "bfloat16"  # of the computation; weights and Adam stay float32
    config.model.remat = "dots"  # fills 80 GB with two micro-batches; a smaller device: "auto"
    config.data.sources = ({"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"},)
    config.data.eval_fraction = 0.01
    config.data.max_length = 4096
    config.data.row_length = 4096
    config.data.truncation = "keep_start"  # a long dialogue loses its last turns
    config.batch_size = 64  # packed rows: 262,144 tokens
    config.grad_accum_steps = 2
    config.optimizer.learning_rate = 2e-5
    config.optimizer.b2 = 0.95
    config.optimizer.warmup_steps = 90
    config.eval.every = 200
    config.eval.num_batches = 8
    config.checkpoint.every = 200
    return config

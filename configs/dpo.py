r"""DPO of Llama-3.1-8B on UltraFeedback, from the model that configs/sft.py makes.

paper     Direct Preference Optimization, arXiv 2305.18290, equation 7; data and learning rate as Zephyr's, 2310.16944
command   bash launch/gpu_node.sh --config=configs/dpo.py
          bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-16 -- --config=configs/dpo.py \
               --config.workdir=gs://BUCKET/llama3_8b/dpo --config.model.path=DIR_OF_THE_SFT_MODEL
first     bash launch/gpu_node.sh --config=configs/sft.py     # writes runs/llama3_8b/sft/export; or --config.model.path
your own  --config.model.path=DIR_OR_HUB_ID --config.data.sources=pairs.jsonl
hardware  one node of 8 H100-80GB, or a TPU slice v5p-16: 8 chips of 95 GiB on 2 hosts
memory    each device holds 13.1 GiB (float32 weights 3.7, Adam 7.5, bfloat16 reference 1.9); a step takes 69 GiB on
          an H100 and 74 on a v5p chip (compiled for both by `jaxalign plan`, not run there)
time      about 12 min on 8 H100 (1.76 s a step, MFU 60 %), 20 min on v5p-16 (3.13 s, 73 %), beside evaluation: 61 k
          pairs of about 800 tokens, the prompt once, the reference included, as `jaxalign plan` predicts where
          products reach 75 and 90 % of the peak
numbers   literature, Llama-3-8B, UltraFeedback, beta 0.01: AlpacaEval 2 length-controlled 18.2 % from 6.2 % of its SFT
          model, Arena-Hard 15.9 from 3.3 (github.com/princeton-nlp/SimPO); of this config: not yet measured
see       rewards/accuracies from 0.5 up (0 at step 1, where all pairs tie: rewards/ties); `jaxalign compare` with a
          reward that training has not seen
"""

from jaxalign.config import defaults


def get_config():
    """The stage, for 8 devices of 80 GB or more."""
    config = defaults("dpo")
    config.workdir = "runs/llama3_8b/dpo"
    config.model.path = "runs/llama3_8b/sft/export"
    config.model.dtype = "bfloat16"  # of the computation; weights and Adam stay float32
    config.model.remat = "auto"  # as little as fits
    config.model.frozen_dtype = "bfloat16"  # the reference is only read
    config.data.sources = ("argilla/ultrafeedback-binarized-preferences-cleaned",)
    config.data.eval_fraction = 0.02
    config.data.max_length = 2048
    config.data.max_prompt_length = 1024
    config.data.truncation = "keep_end"
    config.data.packing = True
    config.data.row_length = 4096  # about five pairs
    config.batch_size = 32  # packed rows: about 160 pairs
    config.algorithm.beta = 0.1
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 40
    config.eval.every = 100
    config.checkpoint.every = 100
    return config

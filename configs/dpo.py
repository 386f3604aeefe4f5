"""DPO of Llama-3.1-8B on UltraFeedback, from the model that configs/sft.py makes.

paper     Direct Preference Optimization, arXiv 2305.18290, equation 7; learning rate and set of Zephyr, arXiv 2310.16944
command   bash launch/gpu_node.sh --config=configs/dpo.py
          bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-16 -- --config=configs/dpo.py:tpu \
               --config.workdir=gs://BUCKET/llama3_8b/dpo --config.model.path=DIR_OF_THE_SFT_MODEL
your own  --config.model.path=DIR_OR_HUB_ID --config.data.sources=pairs.jsonl
hardware  gpu: one node of 8 H100-80GB;  tpu: v5p-16, 8 chips of 95 GiB on 2 hosts
memory    MEMORY
time      about 25 min (an estimate: 50 M tokens of 8 N FLOPs, the reference included, at 30 % MFU on 8 H100;
          50 min on v5p-16)
numbers   literature, Llama-3-8B, UltraFeedback, beta 0.01: AlpacaEval 2 length-controlled 18.2 % from 6.2 % of its SFT
          model, Arena-Hard 15.9 from 3.3 (github.com/princeton-nlp/SimPO); of this config: not yet measured
see       rewards/accuracies from 0.5 up; `jaxalign compare` with a reward that training has not seen
"""

from jaxalign.config import defaults


def get_config(hardware: str = "gpu"):
    """The stage on "gpu" or "tpu"."""
    config = defaults("dpo")
    config.workdir = "runs/llama3_8b/dpo"
    config.model.path = "runs/llama3_8b/sft/export"
    config.model.dtype = "bfloat16"  # of the computation; weights and Adam stay float32
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

"""What the fork server imports ahead: everything slow, and nothing that starts a device or a thread."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import orbax.checkpoint  # noqa: F401
import tokenizers  # noqa: F401
import transformers.models.auto.tokenization_auto  # noqa: F401

import jaxalign.data.dataset
import jaxalign.train.trainer  # noqa: F401

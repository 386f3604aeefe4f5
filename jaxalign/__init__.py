"""jaxalign teaches a language model preferences, in JAX and Flax.

Everything is imported when it is first used, so that `import jaxalign` takes no time:

- losses: `sft_loss`, `reward_loss`, `sigmoid_loss` (DPO), `ipo_loss`, `policy_loss`, `value_loss`
- estimators: `gae`, `kl_estimate`, `token_rewards`, `adapt_kl_coef`
- models: `Model`, `load`, `save`
- training: `defaults`, `stages`, `train(config)`
- steps: `make_train_step`, `make_eval_step`, `Objective`, `Sums`, `TrainState`
- texts: `generate`
- `InputError`, which says what was found, what was expected and what fixes it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors and type checkers; the same names as in _FACE
    from jaxalign.config import defaults as defaults
    from jaxalign.config import stages as stages
    from jaxalign.errors import InputError as InputError
    from jaxalign.library import generate as generate
    from jaxalign.library import load as load
    from jaxalign.library import train as train
    from jaxalign.models.export import save as save
    from jaxalign.models.transformer import Model as Model
    from jaxalign.ops.advantages import gae as gae
    from jaxalign.ops.kl import adapt_kl_coef as adapt_kl_coef
    from jaxalign.ops.kl import kl_estimate as kl_estimate
    from jaxalign.ops.kl import token_rewards as token_rewards
    from jaxalign.ops.losses_language import sft_loss as sft_loss
    from jaxalign.ops.losses_policy import policy_loss as policy_loss
    from jaxalign.ops.losses_policy import value_loss as value_loss
    from jaxalign.ops.losses_preference import ipo_loss as ipo_loss
    from jaxalign.ops.losses_preference import sigmoid_loss as sigmoid_loss
    from jaxalign.ops.losses_reward import reward_loss as reward_loss
    from jaxalign.steps.objective import Objective as Objective
    from jaxalign.steps.objective import Sums as Sums
    from jaxalign.steps.step import make_eval_step as make_eval_step
    from jaxalign.steps.step import make_train_step as make_train_step
    from jaxalign.types import TrainState as TrainState

# Where each name lives.  `train` is the package of that name, which may be called.
_FACE = {
    "defaults": "config", "stages": "config", "InputError": "errors",
    "generate": "library", "load": "library",
    "save": "models.export", "Model": "models.transformer",
    "gae": "ops.advantages",
    "adapt_kl_coef": "ops.kl", "kl_estimate": "ops.kl", "token_rewards": "ops.kl",
    "sft_loss": "ops.losses_language", "reward_loss": "ops.losses_reward",
    "policy_loss": "ops.losses_policy", "value_loss": "ops.losses_policy",
    "ipo_loss": "ops.losses_preference", "sigmoid_loss": "ops.losses_preference",
    "Objective": "steps.objective", "Sums": "steps.objective",
    "make_eval_step": "steps.step", "make_train_step": "steps.step",
    "TrainState": "types",
}  # fmt: skip
__all__ = sorted([*_FACE, "train"])


def __getattr__(name: str) -> Any:
    import importlib

    if name == "train":
        return importlib.import_module("jaxalign.train")
    if name not in _FACE:
        raise AttributeError(f"module 'jaxalign' has no attribute {name!r}; it offers {', '.join(__all__)}")
    found = getattr(importlib.import_module(f"jaxalign.{_FACE[name]}"), name)
    globals()[name] = found  # looked up once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

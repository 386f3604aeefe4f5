"""The models of a run: which checkpoint each role starts from, in which dtype, where on the mesh."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.config import check_lengths, max_length
from jaxalign.errors import InputError, named
from jaxalign.models import hf
from jaxalign.models.config import ModelConfig, read_config
from jaxalign.models.hub import locate
from jaxalign.models.transformer import Model
from jaxalign.ops.attention import require_backend
from jaxalign.ops.rope import BY_LENGTH
from jaxalign.ops.trees import joined
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import Params


class Role(NamedTuple):
    """A model's part in a run."""

    model: Model
    load: Callable[[], Params]  # reads the start values; another call gives another copy
    learning_rate: float = 0.0  # peak; 0 for frozen roles
    check: Callable[[], None] = lambda: None  # refuses a checkpoint that `load` cannot take; headers alone are read
    source: tuple | None = None  # what `load` reads and into which dtype; frozen roles of one source share its arrays
    part: Callable[[Params], Params] = lambda tree: tree  # what of the model's parameters this role holds

    def abstract(self) -> Params:
        """Shapes and dtypes of what it holds."""
        return self.part(self.model.abstract())


@dataclasses.dataclass(frozen=True)
class Roles:
    """Makes roles from the configuration's paths."""

    config: Any
    mesh: Mesh

    def policy(self, learning_rate: float) -> Role:
        """The model that is trained to talk: `model.path`, from its values or from scratch."""
        c = self.config.model
        return self._role(c.path, c.param_dtype, "lm", learning_rate, c.from_scratch)

    def reference(self, path: str | None = None) -> Role:
        """The frozen model that the policy is held to: the policy's own start values, or those at `path`."""
        c = self.config.model
        dtype = c.frozen_dtype or c.param_dtype
        if path is None:
            return self._role(c.path, dtype, "lm", 0.0, c.from_scratch)
        return self._role(path, dtype, "lm", 0.0, False)

    def scorer(self, path: str, learning_rate: float = 0.0) -> Role:
        """A model with a scalar head: trained where there is a learning rate, else frozen."""
        c = self.config.model
        dtype = c.param_dtype if learning_rate else c.frozen_dtype or c.param_dtype
        scratch = c.from_scratch and path == c.path
        if not learning_rate:
            self._check_scores(path)
        return self._role(path, dtype, "score", learning_rate, scratch)

    def _check_scores(self, path: str) -> None:
        """Refuses a frozen scorer whose head would be a fresh one: its scores would be noise."""
        c = self.config.model
        with named(self._field(path)):
            directory = locate(path, revision_of(path, self.config), weights=False)
            found = read_config(directory, dtype=c.dtype, param_dtype=c.dtype, remat="none")
        if found.head != "score":
            raise InputError(
                f"{path} is no reward model: it has no scalar head",
                "the export of a reward stage, or another sequence classifier with one label",
                "--config.rewards.model=WORKDIR/export of algorithm.name=reward",
            )

    def _field(self, path: str) -> str:
        """The field that a path came from."""
        return next((f for f, given in model_fields(self.config).items() if given == path), "model.path")

    def _role(self, path, param_dtype, head, learning_rate, scratch) -> Role:
        c, revision = self.config.model, revision_of(path, self.config)
        options = {
            "dtype": c.dtype,
            "param_dtype": param_dtype,
            "remat": c.remat if learning_rate else "none",
            "head": head,
            "rope_length": c.rope_length or self.config.data.max_length,
            "revision": revision,
        }
        key, field = jax.random.key(self.config.seed), self._field(path)
        shardings = lambda tree: param_shardings(self.mesh, tree)  # noqa: E731

        def load() -> Params:
            make = hf.from_scratch if scratch else hf.load
            fresh = None if head == "score" and not learning_rate else key  # a frozen head is never a fresh one
            with named(field):
                return make(path, shardings=shardings, key=key if scratch else fresh, **options)[1]

        fields = {k: v for k, v in options.items() if k != "revision"}
        with named(field):
            directory = locate(path, revision, weights=False)
            found = read_config(directory, **fields)

        def check() -> None:
            if not scratch and os.path.isdir(os.path.expanduser(path)):  # a hub's weights come when they are needed
                with named(field):
                    hf.check(directory, found)

        require_backend(c.attention, self.mesh.devices.flat[0], c.dtype, found.head_dim)
        return Role(Model(found, c.attention), load, learning_rate, check, (path, revision, param_dtype, head, scratch))


def revision_of(path: str, config: Any) -> str | None:
    """At which revision a hub id is read: `model.revision` is that of `model.path`, whichever role or file is read.

    Args:
      path: of a model or tokenizer.
      config: of the stage.
    """
    return config.model.revision if path == config.model.path else None


def model_fields(config: Any) -> dict[str, str]:
    """The paths of a stage's models by the fields that give them."""
    found = {"model.path": config.model.path}
    for section, leaf in (("algorithm", "reference_path"), ("algorithm", "value_path"), ("rewards", "model")):
        if path := config.get(section, {}).get(leaf):
            found[f"{section}.{leaf}"] = path
    return found


def describe_start(config: Any) -> ModelConfig:
    """What `model.path` is, read before its tokenizer and before any data.

    Args:
      config: of the stage.

    Raises:
      InputError: no model there, a broken `config.json`, or a revision of a directory.
    """
    c = config.model
    if c.revision and os.path.isdir(os.path.expanduser(c.path)):
        raise InputError(
            f"model.revision is {c.revision!r}, and model.path is a directory, {c.path}",
            "a revision of a hub id: a directory has none",
            "--config.model.revision=None",
        )
    directory = locate(c.path, c.revision, weights=False)
    return read_config(directory, dtype=c.dtype, param_dtype=c.param_dtype, remat="none")


def fit_length(config: Any) -> tuple[Any, list[str]]:
    """A stage's configuration with its `data.max_length` settled by what its models were made for.

    Args:
      config: one stage's; not changed.

    Returns:
      The configuration in which `data.max_length` is a number, and warnings: a longer one that was asked for, what it
        cuts short.

    Raises:
      InputError: no model at one of the paths, or lengths that leave no room for each other.
    """
    c = config.copy_and_resolve_references()
    models, usual = {}, {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
    for field, path in model_fields(c).items():
        with named(field):
            models[path] = read_config(locate(path, revision_of(path, c), weights=False), **usual)
    positions = {path: model.context for path, model in models.items() if model.context is not None}
    shortest = min(positions, key=lambda path: positions[path], default=None)
    limit = None if shortest is None else positions[shortest]
    longest = max_length(c, limit)
    told = []
    if limit is not None and longest > limit:
        told.append(
            f"data.max_length is {longest:,}, and {shortest} was made for {limit:,} tokens: what it reads beyond them "
            f"is like nothing that it has seen (--config.data.max_length={limit})"
        )
    if c.model.get("rope_length") is not None and not any(model.rope.kind in BY_LENGTH for model in models.values()):
        kinds = ", ".join(sorted({model.rope.kind for model in models.values()}))
        told.append(f"model.rope_length has no effect: it is for rope types {' and '.join(BY_LENGTH)}, not {kinds}")
    told += check_lengths(c, limit)
    with c.unlocked():
        c.data.max_length = longest
    return c, told


def tokenizer_of_export(model: Mapping[str, Any], source: Path, tokenizer: Any) -> Any:
    """What `jaxalign.save` takes as an export's tokenizer: None where its files in the model's directory are copied.

    Args:
      model: the section of the configuration.
      source: where the model is.
      tokenizer: that was loaded by it; written where it is not the model's own, or was made of other files.
    """
    own = model["tokenizer"] in (None, model["path"]) and model["chat_template"] is None
    flat = not isinstance(tokenizer.chat_template, dict)  # several templates by name may lie in a folder
    return None if own and flat and (source / "tokenizer.json").is_file() else tokenizer


def per_source(roles: Mapping[str, Role], make: Callable[[Role], Params]) -> dict[str, Params]:
    """What each role holds of the whole model that `make` gives, which is asked once for the roles of one source."""
    made: dict[Any, Params] = {}
    for name, role in roles.items():
        if (key := role.source or name) not in made:
            made[key] = make(role)
    return {name: role.part(made[role.source or name]) for name, role in roles.items()}


def bytes_by_role(params: Mapping[str, Params], frozen: Mapping[str, Params]) -> dict[str, int]:
    """Bytes of each role's arrays, trained and frozen; those that several roles share count for the first.

    >>> base = {"base": jax.numpy.zeros(2)}
    >>> bytes_by_role({"policy": {"adapter": jax.numpy.ones(3)}}, {"policy": base, "ref": base})
    {'policy': 20, 'ref': 0}
    """
    found: dict[str, int] = {}
    whole = joined(params, frozen)
    counted = []
    for name, tree in (whole | {n: tree for n, tree in frozen.items() if n not in whole}).items():
        counted.append(tree)
        found[name] = num_bytes(counted) - sum(found.values())
    return found

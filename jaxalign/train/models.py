"""The models of a run: which checkpoint each role starts from, in which dtype, where on the mesh."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.config import check_lengths, max_length
from jaxalign.errors import InputError, named
from jaxalign.models import adapter as adapters
from jaxalign.models import hf
from jaxalign.models.adapter import Rules, is_adapter
from jaxalign.models.config import ModelConfig, read_config
from jaxalign.models.hub import locate
from jaxalign.models.transformer import Model
from jaxalign.ops.attention import require_backend
from jaxalign.ops.rope import BY_LENGTH
from jaxalign.ops.trees import by_path, from_paths, join, joined, path_pattern, split
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.parallel.sharding import param_shardings, path_name
from jaxalign.types import Params

_PATTERNS = ("rank_pattern", "alpha_pattern")


class Role(NamedTuple):
    """A model's part in a run."""

    model: Model
    read: Callable[[Callable[[str], bool]], Params]  # the start values at some paths; another call gives another copy
    learning_rate: float = 0.0  # peak; 0 for frozen roles
    check: Callable[[], None] = lambda: None  # refuses a checkpoint that `read` cannot take; headers alone are read
    source: tuple | None = None  # what `read` reads and into which dtype; frozen roles of one source share its arrays
    holds: Callable[[str], bool] = lambda path: True  # which of the model's parameters are this role's
    rest: Role | None = None  # the others, frozen, where it is trained in part

    def abstract(self) -> Params:
        """Shapes and dtypes of what it holds."""
        return split(self.model.abstract(), self.holds)[0]

    def load(self) -> Params:
        """Start values of what it holds."""
        return self.read(self.holds)


@dataclasses.dataclass(frozen=True)
class Roles:
    """Makes roles from the configuration's paths."""

    config: Any
    mesh: Mesh

    def policy(self, learning_rate: float) -> Role:
        """The model that is trained to talk: `model.path`, from its values or from scratch."""
        c = self.config.model
        return self._trained(c.path, "lm", learning_rate, c.from_scratch)

    def reference(self, path: str | None = None) -> Role:
        """The frozen model that the policy is held to: the policy's own start values, or those at `path`."""
        c = self.config.model
        dtype = c.frozen_dtype or c.param_dtype
        if path is not None:
            return self._role(path, dtype, "lm", 0.0, False)
        adapter = self.config.adapter
        if not adapter.dora:  # a fresh adapter changes nothing
            return self._role(c.path, dtype, "lm", 0.0, c.from_scratch)
        # DoRA's norms are those of the kernels but for rounding: only a copy of it starts at the same log-probs.
        return self._role(c.path, dtype, "lm", 0.0, c.from_scratch, self._rules())

    def scorer(self, path: str, learning_rate: float = 0.0) -> Role:
        """A model with a scalar head: trained where there is a learning rate, else frozen."""
        c = self.config.model
        scratch = c.from_scratch and path == c.path
        if learning_rate:
            return self._trained(path, "score", learning_rate, scratch)
        self._check_scores(path)
        return self._role(path, c.frozen_dtype or c.param_dtype, "score", 0.0, scratch)

    def _trained(self, path: str, head: str, learning_rate: float, scratch: bool) -> Role:
        """A role that is trained as `adapter` and `model.train` say, and the frozen rest of its model."""
        c = self.config
        rules = self._rules()
        whole = self._role(path, c.model.param_dtype, head, learning_rate, scratch, rules)
        if rules is None and not c.model.train:
            return whole
        trains = trained_paths(whole.model, c.model.train)
        rest = self._role(path, c.model.frozen_dtype or c.model.param_dtype, head, 0.0, scratch, rules)
        rest = rest._replace(holds=lambda leaf_path: not trains(leaf_path))
        return whole._replace(holds=trains, rest=rest if jax.tree.leaves(rest.abstract()) else None)

    def _rules(self) -> Rules | None:
        """Of the adapters that are trained."""
        c = self.config.adapter
        if not c.rank:
            return None
        pairs = {name: tuple((str(pattern), value) for pattern, value in c[name]) for name in _PATTERNS}
        return Rules(c.rank, c.alpha, tuple(c.targets), **pairs, rslora=c.rslora, dora=c.dora)

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

    def _role(self, path, param_dtype, head, learning_rate, scratch, rules: Rules | None = None) -> Role:
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
        fields = {k: v for k, v in options.items() if k != "revision"}
        with named(field):
            directory = locate(path, revision, weights=False)
            found = read_config(directory, **fields)
        adapter = None if rules is None else adapters.make(found, rules)
        model = Model(dataclasses.replace(found, adapter=adapter), c.attention)

        def read_base(wanted: Callable[[str], bool]) -> Params:
            make = hf.from_scratch if scratch else hf.load
            fresh = None if head == "score" and not learning_rate else key  # a frozen head is never a fresh one
            with named(field):
                return make(path, shardings=shardings, key=key if scratch else fresh, wanted=wanted, **options)[1]

        def read(wanted: Callable[[str], bool]) -> Params:
            own = split(model.abstract(), lambda leaf_path: is_adapter(leaf_path) and wanted(leaf_path))[0]
            base = read_base(lambda leaf_path: not is_adapter(leaf_path) and wanted(leaf_path))
            if not own:
                return base
            kernels = read_base(lambda leaf_path: leaf_path in normed) if (normed := model.normed_kernels()) else {}
            make = jax.jit(model.init_adapter, out_shardings=shardings(own))
            return join(base, make(key, kernels.get("layers", {})))

        def check() -> None:
            if not scratch and os.path.isdir(os.path.expanduser(path)):  # a hub's weights come when they are needed
                with named(field):
                    hf.check(directory, found)

        require_backend(c.attention, self.mesh.devices.flat[0], c.dtype, found.head_dim)
        return Role(model, read, learning_rate, check, (path, revision, param_dtype, scratch))


def trained_paths(model: Model, patterns: Sequence[str]) -> Callable[[str], bool]:
    """Which of a model's parameters are trained: those of an adapter, a scalar head, and what the patterns name.

    Args:
      model: with an adapter, or with none.
      patterns: regular expressions of whole names of a path: "lm_head", "layers/mlp", "layers/.*norm", as
        `model.train` has them.

    Raises:
      InputError: a pattern that matches no parameter, or that is no regular expression.
    """
    there = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(model.abstract())[0]]
    expressions = []
    for pattern in patterns:
        try:
            expression = path_pattern(pattern)
        except re.error as error:
            expected = "a regular expression of a parameter's path"
            raise InputError(f"model.train {pattern!r}: {error}", expected, "--config.model.train=lm_head") from error
        if not any(expression.search(leaf_path) for leaf_path in there):
            near = get_close_matches(pattern, there, n=1, cutoff=0.0)[0]
            raise InputError(
                f"model.train {pattern!r} matches no parameter",
                f"whole names of a path such as {', '.join(there[:4])}",
                f"--config.model.train={near}",
            )
        expressions.append(expression)

    def trains(leaf_path: str) -> bool:
        own = is_adapter(leaf_path) or leaf_path.startswith("score/")
        return own or any(expression.search(leaf_path) for expression in expressions)

    return trains


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
    table = min((model.num_positions for model in models.values() if model.num_positions), default=longest)
    if longest > table:
        raise InputError(
            f"data.max_length is {longest:,}, and {shortest} has a table of {table:,} positions",
            f"at most {table:,} tokens of prompt and completion together",
            f"--config.data.max_length={table}",
        )
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


def shared(roles: Mapping[str, Role], read: Callable[[str, Role], Params]) -> dict[str, Params]:
    """What each role holds; parameters that several roles hold of one source are the same arrays.

    Args:
      roles: frozen ones.
      read: (name, role) -> what the role holds, asked with those that an earlier role has left out of it.
    """
    made: dict[Any, dict[str, Any]] = {}
    found = {}
    for name, role in roles.items():
        there = made.setdefault(role.source or name, {})
        wanted = by_path(role.abstract()).keys()
        if missing := wanted - there.keys():
            there |= by_path(read(name, role._replace(holds=missing.__contains__)))
        found[name] = from_paths({path: there[path] for path in wanted})
    return found


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

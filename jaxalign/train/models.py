"""The models of a run: which checkpoint each role starts from, in which dtype, where on the mesh."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.config import check_lengths, max_length
from jaxalign.errors import InputError, named
from jaxalign.models import hf
from jaxalign.models.adapter import Rules, is_adapter
from jaxalign.models.added_tokens import Added
from jaxalign.models.config import ModelConfig, read_config
from jaxalign.models.hub import locate
from jaxalign.models.quantised import kernel_at
from jaxalign.models.stacks import place
from jaxalign.models.token_rows import table_of
from jaxalign.models.transformer import Model
from jaxalign.ops.attention import require_backend
from jaxalign.ops.rope import BY_LENGTH
from jaxalign.ops.trees import by_path, from_paths, join, joined, split
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.ranges import QUANTISED
from jaxalign.registry import ALGORITHMS
from jaxalign.train import trained
from jaxalign.train.starts import start_of
from jaxalign.types import Params

_PATTERNS = ("rank_pattern", "alpha_pattern")


class Role(NamedTuple):
    """A model's part in a run."""

    model: Model
    read: Callable[[Callable[[str], bool]], Params]  # the start values at some paths; another call gives another copy
    learning_rate: float = 0.0  # peak; 0 for frozen roles
    check: Callable[[], None] = lambda: None  # refuses a checkpoint that `read` cannot take; headers alone are read
    # Where the value at a path comes from: frozen roles share the arrays of one origin. None: from nowhere else.
    origin: Callable[[str], Hashable] | None = None
    holds: Callable[[str], bool] = lambda path: True  # which of the model's parameters are this role's
    learned: Callable[[str], bool] = lambda path: False  # which of them an adapter that it starts from has of its own
    rest: Role | None = None  # the others, frozen, where it is trained in part
    base: tuple[str, str | None] | None = None  # the whole model that it starts from: directory or hub id, revision

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
    added: Added | None = None  # tokens that `model.path` has no vectors of
    token_ids: tuple[int, ...] = ()  # of `model.add_tokens`

    def policy(self, learning_rate: float) -> Role:
        """The model that is trained to talk: `model.path`, from its values or from scratch."""
        c = self.config.model
        return self._trained(c.path, "lm", learning_rate, c.from_scratch)

    def reference(self, path: str | None = None) -> Role:
        """The frozen model that the policy is held to: the policy's own start values, or those at `path`."""
        c = self.config.model
        if path is not None:
            return self._role(path, "lm", 0.0, False, frozen=True)
        # A fresh adapter changes nothing, but DoRA's norms are those of the kernels but for rounding: only a copy of it
        # starts at the same log-probs. So does one of an adapter that is trained on.
        rules = self._rules() if self.config.adapter.dora else None
        return self._role(c.path, "lm", 0.0, c.from_scratch, rules, frozen=True)

    def scorer(self, path: str, learning_rate: float = 0.0) -> Role:
        """A model with a scalar head: trained where there is a learning rate, else frozen."""
        c = self.config.model
        scratch = c.from_scratch and path == c.path
        if learning_rate:
            return self._trained(path, "score", learning_rate, scratch)
        self._check_scores(path)
        return self._role(path, "score", 0.0, scratch, frozen=True)

    def _trained(self, path: str, head: str, learning_rate: float, scratch: bool) -> Role:
        """A role that is trained as `adapter` and `model.train` say, and the frozen rest of its model."""
        c = self.config
        rules = self._rules()
        whole = self._role(path, head, learning_rate, scratch, rules)
        if whole.model.config.adapter is None and not c.model.train:
            return whole
        if kind := self._frozen()[1]:  # its frozen kernels in few bits are what the trained part is computed with
            whole = self._role(path, head, learning_rate, scratch, rules, quantised=kind)
        patterns = trained.with_added(c.model.train, self.token_ids)
        if head != ALGORITHMS[c.algorithm.name].head:  # of a value model beside a policy
            patterns = trained.of_head(whole.model.config, patterns)
        if rows := trained.token_rows_of(whole.model.config, patterns):
            whole = self._role(path, head, learning_rate, scratch, rules, quantised=kind, token_rows=rows)
        trains = trained_paths(whole, patterns)
        rest = self._role(path, head, 0.0, scratch, rules, frozen=True, token_rows=rows)
        rest = rest._replace(holds=lambda leaf_path: not trains(leaf_path))
        return whole._replace(holds=trains, rest=rest if jax.tree.leaves(rest.abstract()) else None)

    def _frozen(self) -> tuple[str, str | None]:
        """What frozen parameters are kept in: the dtype, and where layers' kernels take fewer bits, how.

        Beside such kernels the rest is kept in the dtype of the computation: in float32 an embedding and a head of
        8B would take more than all kernels in four bits.
        """
        c = self.config.model
        if c.frozen_dtype in QUANTISED:
            return c.dtype, c.frozen_dtype
        return c.frozen_dtype or c.param_dtype, None

    def _rules(self) -> Rules | None:
        """Of the adapters that are trained."""
        c = self.config.adapter
        if not c.rank:
            return None
        pairs = {name: tuple((str(pattern), value) for pattern, value in c[name]) for name in _PATTERNS}
        return Rules(c.rank, c.alpha, tuple(c.targets), **pairs, rslora=c.rslora, dora=c.dora)

    def _named(self, path: str) -> Any:
        """Names the field that a path came from in errors of the block, or of a function."""
        return named(self._field(path))

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

    def _role(
        self, path, head, learning_rate, scratch, rules: Rules | None = None, *, frozen=False, quantised=None, **more
    ) -> Role:
        c = self.config.model
        param_dtype, kind = self._frozen() if frozen else (c.param_dtype, quantised)
        with self._named(path):
            start = start_of(
                path,
                revision_of(path, self.config),
                self.mesh,
                key=jax.random.key(self.config.seed),
                scratch=scratch,
                new_head=head == "score" and bool(learning_rate),  # a frozen head is never a fresh one
                rules=rules,
                attention=c.attention,
                quantised=kind,
                added=self.added if path == c.path else None,
                train=tuple(c.train),
                **more,
                dtype=c.dtype,
                param_dtype=param_dtype,
                remat=c.remat if learning_rate else "none",
                head=head,
                rope_length=c.rope_length or self.config.data.max_length,
            )
        require_backend(c.attention, self.mesh.devices.flat[0], c.dtype, start.model.config.head_dim)
        read, check = (self._named(path)(call) for call in (start.read, start.check))
        return Role(start.model, read, learning_rate, check, start.origin, learned=start.learned, base=start.base)


def trained_paths(role: Role, patterns: Sequence[str]) -> Callable[[str], bool]:
    """Which of a model's parameters are trained: an adapter and all that it has learned, a scalar head, what is named.

    Args:
      role: with an adapter, or with none.
      patterns: regular expressions of whole names of a path, Hugging Face's or ours: "lm_head", "layers/mlp",
        "layers[-2:]", as `model.train` has them.

    Raises:
      InputError: a pattern that matches no parameter, or that is no regular expression; some layers beside an adapter.
    """
    config = role.model.config
    kept = {kernel for path in by_path(role.model.abstract()) if (kernel := kernel_at(path))}
    for pattern in patterns:
        trained.check(config, pattern)
        own = trained.matched(config, [pattern])
        if frozen := [path for path in own if path in kept and any(own[path])]:
            raise InputError(
                f"model.train {pattern!r} trains {frozen[0]}, which model.frozen_dtype={config.quantised} keeps",
                "parameters other than layers' kernels, which keep their bits",
                "--config.model.frozen_dtype=bfloat16",
            )
    if trained.cuts_of(config, patterns) != config.cuts:
        if config.adapter is None:
            raise InputError(
                f"model.train trains some layers and not others, which model.frozen_dtype={config.quantised} keeps",
                "the same parameters of all layers, or frozen kernels of 16 bits",
                "--config.model.frozen_dtype=bfloat16",
            )
        raise InputError(
            "model.train trains some layers and not others, beside an adapter",
            "the same parameters of all layers, or some layers without an adapter",
            "--config.adapter.rank=0, or --config.adapter.targets with the layers' numbers",
        )
    found = trained.matched(config, patterns)
    for table, _ in config.token_rows.ranges if config.token_rows else ():
        if found[table][0] or role.learned(table):
            raise InputError(
                f"model.train names some vectors of {table}, and all of it is trained",
                "one of the two",
                f"--config.model.train={table.partition('/')[0]}",
            )

    def trains(leaf_path: str) -> bool:
        path, layer, _ = place(leaf_path)
        own = is_adapter(path) or path.startswith("score/") or role.learned(path) or table_of(path) is not None
        return own or (path in found and found[path][layer])

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


def adapter_base(role: Role, merge: bool = False) -> str | None:
    """The model beside which an export of a role is an adapter, a directory or a hub id; None: it is a whole model.

    With added tokens it is one: the base has no vectors of them, and what loads an adapter beside it would not say so.

    Args:
      role: that was trained.
      merge: whether a whole model is asked for.
    """
    config = role.model.config
    return None if config.adapter is None or config.added is not None or role.base is None or merge else role.base[0]


def write_export(
    directory: str, role: Role, params: Params, rest: Callable[[], Params], *, merge: bool = False, **options: Any
) -> Any:
    """Writes what a role has learned: an adapter in PEFT's form where one was trained, else the whole model.

    Args:
      directory: where.
      role: that was trained.
      params: what it holds.
      rest: gives the frozen rest of its model.
      merge: write a whole model, an adapter merged into its kernels.
      options: of `hf.save`.
    """
    if (base := adapter_base(role, merge)) is not None and role.base is not None:
        return hf.save(directory, role.model, params, base=base, base_revision=role.base[1], **options)
    return hf.save(directory, role.model, join(params, rest()), **options)


def tokenizer_of_export(config: Mapping[str, Any], source: Path, tokenizer: Any) -> Any:
    """What `jaxalign.save` takes as an export's tokenizer: None where its files in the model's directory are copied.

    Args:
      config: of the stage.
      source: where the model is.
      tokenizer: that was loaded by it; written where it is not the model's own, or was made of other files.
    """
    model = config["model"]
    own = model["tokenizer"] in (None, model["path"]) and model["chat_template"] is None
    # Else they are in the template, or in the vocabulary.
    own = own and not config["data"].get("chat_template_kwargs") and not model.get("add_tokens")
    flat = not isinstance(tokenizer.chat_template, dict)  # several templates by name may lie in a folder
    return None if own and flat and (source / "tokenizer.json").is_file() else tokenizer


def shared(roles: Mapping[str, Role], read: Callable[[str, Role], Params]) -> dict[str, Params]:
    """What each role holds; parameters that several roles hold of one source are the same arrays.

    Args:
      roles: frozen ones.
      read: (name, role) -> what the role holds, asked with those that an earlier role has left out of it.
    """
    made: dict[tuple[Hashable, str], Any] = {}
    found = {}
    for name, role in roles.items():
        places = {path: (role.origin(path) if role.origin else name, path) for path in by_path(role.abstract())}
        if missing := {path for path, place in places.items() if place not in made}:
            values = by_path(read(name, role._replace(holds=missing.__contains__)))
            made |= {places[path]: value for path, value in values.items()}
        found[name] = from_paths({path: made[place] for path, place in places.items()})
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

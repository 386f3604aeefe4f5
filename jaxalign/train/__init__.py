"""Optimizer, loop, experience, checkpoints, metrics.

`jaxalign.train(config, dry_run=False)` runs a configuration: the package may be called, see `jaxalign.library.train`.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """This package, which `jaxalign.train(config)` calls: the name is taken by both."""

    def __call__(self, config: Any, *, dry_run: bool = False) -> dict[str, Any]:
        """Runs a configuration; see `jaxalign.library.train`."""
        return importlib.import_module("jaxalign.library").train(config, dry_run=dry_run)


sys.modules[__name__].__class__ = _Callable

"""Checkpoints of a run's whole state: asynchronous, atomic, the last n and the best one kept."""

from __future__ import annotations

import os
from typing import Any

import jax

from jaxalign.errors import InputError
from jaxalign.parallel.sharding import path_name
from jaxalign.types import TrainState


class Checkpoints:
    """The folder `checkpoints/` of a run: one sub-folder `N` per checkpoint, N batches of the data stream done.

    A save copies the state to the host, then writes in the background under a temporary name that becomes `N` when all
    of it is there; whatever a crash leaves behind is never read.
    """

    def __init__(self, directory: Any, *, keep: int, best_metric: str | None = None, best_mode: str = "min"):
        """
        Args:
          directory: where; made when it does not exist.
          keep: how many of the last to keep.
          best_metric: the best by this metric of `save` is kept beside them.
          best_mode: "min" or "max".
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        self._ocp = ocp
        if "://" not in os.fspath(directory):  # Orbax takes no relative path
            directory = os.path.abspath(os.fspath(directory))
        policies: list[Any] = [LatestN(keep)]
        if best_metric:
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    reverse=best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best_metric, self._best_mode = best_metric, best_mode
        self._manager = ocp.CheckpointManager(
            directory,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
                best_mode=best_mode,
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: TrainState, meta: dict, metrics: dict[str, float]) -> None:
        """Starts writing checkpoint `step`; the state may be donated as soon as this returns.

        Args:
          step: batches done.
          state: the whole training state.
          meta: JSON values kept beside it.
          metrics: of this step, with the best metric where one is named.
        """
        if step in self.steps():
            return
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta)),
            metrics=metrics if self._best_metric else None,
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """Reads checkpoint `step`.

        Args:
          step: one of `steps()`.
          like: the state's shapes, dtypes and shardings; the mesh may be another one than at saving.

        Raises:
          InputError: the checkpoint is of another model or optimizer.
        """
        there, wanted = _shapes(self._manager.item_metadata(step).state), _shapes(like)
        wrong = [n for n in sorted(there.keys() | wanted.keys()) if there.get(n) != wanted.get(n)]
        if wrong:
            first = f"{wrong[0]} is {there.get(wrong[0], 'not there')}, wanted {wanted.get(wrong[0], 'nothing')}"
            raise InputError(
                f"checkpoint {step} does not fit this run: {len(wrong)} arrays differ; {first}",
                "the model and optimizer that the run was started with",
                "--config.workdir=ANOTHER",
            )
        args = self._ocp.args
        found = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(like), meta=args.JsonRestore())
        )
        return found.state, found.meta

    def steps(self) -> list[int]:
        """Checkpoints that are whole, or being written."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The last whole checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The best checkpoint by the metric, else the last."""
        found = self._manager.best_step() if self._best_metric else None
        return self.latest() if found is None else found

    def wait(self) -> None:
        """Until everything begun is written; raises what went wrong."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits and lets go."""
        self.wait()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree with the shardings it is to have: what `restore` reads into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)

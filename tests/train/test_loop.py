"""The loop's rules: one compile, figures one step late, what stops it, what it saves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loop_world import Data, World, host_batch

from jaxalign.errors import InputError
from jaxalign.train import interrupts, metrics
from jaxalign.train.checkpoints import Checkpoints
from jaxalign.train.health import Health
from jaxalign.train.interrupts import Interrupted
from jaxalign.train.metrics import Progress, headline


def rows(world):
    return [json.loads(line) for line in world.directory.metrics.read_text().splitlines()]


def saved(world):
    return sorted(int(p.name) for p in world.directory.checkpoints.iterdir())


def test_one_compile_also_after_a_resume(tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    world = World(tmp_path, num_steps=3, checkpoint__every=3)
    world.run()
    world.num_steps = 6
    before = len(compiled)
    state, results = world.run()  # restored, on the same executable
    assert world.step.num_compiles == 1
    assert int(state.data_cursor) == 6 and int(state.step) == 6
    assert [r["step"] for r in rows(world)] == [1, 2, 3, 4, 5, 6]
    assert results["metrics"]["x"] == pytest.approx(1 - 0.8**5)
    assert len(compiled) - before <= 2, "what a resume compiles beside the step stays small"


def test_a_batch_is_a_function_of_its_index(tmp_path):
    world = World(tmp_path, num_steps=4, checkpoint__every=2)
    world.run()
    world.num_steps = 6
    world.run()
    assert world.data.asked == [0, 1, 2, 3, 4, 5]


def test_figures_are_read_one_step_late(tmp_path):
    """Step n + 1 is under way before the figures of step n are waited for."""
    world, events = World(tmp_path, num_steps=4), []
    step, get = world.step, jax.device_get

    class Watched:
        num_compiles, compile_seconds = 0, 0.0

        def __call__(self, *args):
            events.append("step")
            return step(*args)

    def device_get(x):
        if x and isinstance(x, list):
            events.append("read")
        return get(x)

    world.step = Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_get", device_get)
        world.run()
    assert events == ["step", "step", "read", "step", "read", "step", "read", "read"]


def test_the_last_step_is_timed_too_where_updates_are_not_asynchronous(tmp_path):
    """As with several processes on CPUs: when the figures of the last step but one are read, the last is over."""
    world = World(tmp_path, num_steps=5, checkpoint__every=3)
    step, seconds = world.step, 0.1

    class Slow:
        num_compiles, compile_seconds = 0, 0.0

        def __call__(self, *args):
            time.sleep(seconds)
            return jax.block_until_ready(step(*args))

    world.step = Slow()
    world.run()
    fastest = 8 * 4 / seconds  # tokens that are not padding: at most all
    assert max(row["tokens_per_second"] for row in rows(world)) <= fastest


ENDS_AT_WORK = """
import jax, jax.numpy as jnp
from jaxalign.train.loop import note_end

work = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda i, a: jnp.tanh(a @ a), x))
x = jnp.ones((700, 700))
work(x).block_until_ready()
updates = [work(x + 1)]
note_end(updates)
assert not updates[0].is_ready()
raise SystemExit(3)
"""


def test_a_process_that_ends_while_updates_are_under_way_keeps_its_status():
    """A thread that is inside the runtime when the interpreter goes would abort it, status 134."""
    ended = subprocess.run([sys.executable, "-c", ENDS_AT_WORK], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_trap_a_loss_that_is_not_finite_stops_with_step_records_and_checkpoint(tmp_path):
    world = World(tmp_path, num_steps=6, data=Data({3: host_batch(3, value=-1)}), checkpoint__every=2)
    with pytest.raises(InputError) as error:
        world.run()
    assert "step 4, records [24, 25, 26" in error.value.found and "nan" in error.value.found
    assert "last good checkpoint is 2" in error.value.expected
    assert error.value.fix.endswith(f"with --config.workdir=ANOTHER, or remove {tmp_path}")  # it keeps its own fields
    assert saved(world) == [2]
    assert rows(world)[-1]["step"] == 4 and rows(world)[-1]["loss"] is None


def test_trap_a_batch_of_zero_weight_says_why(tmp_path):
    empty = host_batch(1, weight=0.0)
    with pytest.raises(InputError, match="all of these have weight 0"):
        World(tmp_path / "a", data=Data({1: empty})).run()
    masked = empty._replace(readouts=empty.readouts._replace(mask=np.zeros((8, 1), bool)))
    with pytest.raises(InputError, match="chat template without assistant turns"):
        World(tmp_path / "b", data=Data({1: masked})).run()
    padding = masked._replace(record_ids=np.full((8, 1), -1, np.int32))
    with pytest.raises(InputError, match="only padding"):
        World(tmp_path / "c", data=Data({1: padding})).run()


def test_trap_the_smaller_batch_of_an_epoch_may_have_nothing_to_learn_from(tmp_path):
    """A skipped update: the run goes on, and what it tells is of the batches that had weight."""
    world = World(tmp_path, num_steps=3, data=Data({1: host_batch(1, weight=0.0)}, partial=(1,)))
    state, results = world.run()
    first, empty, last = rows(world)
    assert (empty["weight"], empty["empty"]) == (0, 1) and not {"loss", "x", "grad_norm"} & empty.keys()
    assert first["x"] == 0 and last["x"] == pytest.approx(0.2) and int(state.step) == 3
    assert results["metrics"]["loss"] == last["loss"]


@pytest.mark.parametrize("scores", [True, False])
def test_trap_data_smaller_than_a_batch_that_teach_nothing_are_an_error(tmp_path, scores):
    """The only batch of an epoch is never whole; without an error such a run would end as done."""
    data = Data({i: host_batch(i, weight=0.0) for i in range(3)}, batches_per_epoch=1, partial=range(3))
    prepare = lambda state, frozen, batch: (state, [batch], {"objective/scores_share": float(scores)})  # noqa: E731
    with pytest.raises(InputError, match="nothing can be learned from at step 1") as error:
        World(tmp_path, num_steps=3, data=data, prepare=prepare).run()
    assert ("weight" if scores else "score") in error.value.expected


def test_an_update_without_weight_among_others_is_skipped(tmp_path):
    def prepare(state, frozen, batch):
        weight = batch.completions.weight
        return state, [batch, batch._replace(completions=batch.completions._replace(weight=0 * weight))], {}

    world = World(tmp_path, num_steps=2, prepare=prepare)
    state, _ = world.run()
    assert [(r["x"], r["weight"], r["empty"]) for r in rows(world)] == [(0, 8, 1), (pytest.approx(0.2), 8, 1)]
    assert int(state.step) == 4


def test_trap_an_exception_in_the_data_stream_stops_training(tmp_path):
    world = World(tmp_path, data=Data({2: RuntimeError("batch 2, record 17: bad")}))
    with pytest.raises(RuntimeError, match="record 17"):
        world.run()


def test_trap_state_is_donated_and_prepare_has_read_it(tmp_path):
    """A figure that is an array of the state itself must be read before the step takes the state over."""
    seen = []

    def prepare(state, frozen, batch):
        seen.append(state)
        return state, [batch, batch], {"objective/kl_coef": state.params["policy"]["norm"]["scale"][0], "n": state.step}

    world = World(tmp_path, num_steps=3, prepare=prepare)
    state, _ = world.run()
    assert int(state.step) == 6 and int(state.data_cursor) == 3  # two updates for each batch of the stream
    assert [r["n"] for r in rows(world)] == [0, 2, 4]
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(seen[0].params["policy"]["norm"]["scale"])


def test_evaluation_and_checkpoints_come_when_asked_and_at_the_end(tmp_path):
    asked = []

    def evaluate(state):
        asked.append(int(state.data_cursor))
        return {"loss": abs(len(asked) - 2) + 1.0}  # best at the second evaluation

    world = World(
        tmp_path,
        num_steps=7,
        evaluate=evaluate,
        eval__every=2,
        checkpoint__every=2,
        checkpoint__keep=1,
        checkpoint__best_metric="eval/loss",
    )
    world.run()
    assert asked == [2, 4, 6, 7]
    assert saved(world) == [4, 7]  # the best and the last
    checkpoints = Checkpoints(world.directory.checkpoints, keep=1, best_metric="eval/loss")
    assert checkpoints.best() == 4 and checkpoints.latest() == 7
    checkpoints.close()
    assert [r["step"] for r in rows(world) if "eval/loss" in r] == [2, 4, 6, 7]


def test_a_saved_state_is_not_touched_by_later_donated_steps(tmp_path):
    world = World(tmp_path, num_steps=6, checkpoint__every=1, checkpoint__keep=6)
    world.run()
    checkpoints = Checkpoints(world.directory.checkpoints, keep=6)
    for step in checkpoints.steps():
        state, meta = checkpoints.restore(step, world.like)
        assert meta["step"] == step == int(state.data_cursor)
        x = float(state.params["policy"]["norm"]["scale"][0])
        assert x == pytest.approx(1 - 0.8**step, rel=1e-5)
    checkpoints.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    world = World(tmp_path, num_steps=1)
    world.run()
    checkpoints = Checkpoints(world.directory.checkpoints, keep=1)
    params = {"policy": {"norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    with pytest.raises(InputError, match="does not fit"):
        checkpoints.restore(1, world.like._replace(params=params))
    checkpoints.close()


@pytest.fixture
def foreground():
    """SIGINT as a terminal's program has it: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_two_ctrl_c_end_at_once_with_what_was_saved(tmp_path, foreground):
    def prepare(state, frozen, batch):
        if int(state.data_cursor) == 3 and world.num_steps == 6:
            with contextlib.suppress(RuntimeError):  # as a library may that calls back
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
        return state, [batch], {}

    world = World(tmp_path, num_steps=6, checkpoint__every=2, prepare=prepare)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert saved(world) == [2] and interrupts.at_once(RuntimeError("an echo"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    world.num_steps = 5
    state, _ = world.run()
    assert int(state.data_cursor) == 5 and not interrupts.at_once(RuntimeError("another one"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_and_a_resume_are_told(tmp_path, capsys, number):
    def prepare(state, frozen, batch):
        if int(state.data_cursor) == 2:
            os.kill(os.getpid(), number)
        return state, [batch], {}

    world = World(tmp_path, prepare=prepare)
    with pytest.raises(Interrupted):
        world.run()
    (step,) = saved(world)
    assert f"stopped at step {step}, saved; the same command resumes" in capsys.readouterr().err
    world.prepare = lambda state, frozen, batch: (state, [batch], {})
    world.run()
    err = capsys.readouterr().err
    assert f"resuming from step {step} of 6" in err and "stopped" not in err


def test_a_run_that_diverges_says_so_at_its_end(tmp_path, capsys):
    calm = World(tmp_path / "calm", num_steps=5)
    assert calm.run()[1]["warnings"] == [] and "warning" not in capsys.readouterr().err
    world = World(tmp_path / "wild", num_steps=5, rate=1.2)  # each step overshoots by more
    (concern,) = world.run()[1]["warnings"]
    assert concern.startswith("the loss rose from 1 to ") and "learning_rate" in concern
    assert f"warning: test: {concern}" in capsys.readouterr().err


def test_a_run_that_learns_nothing_is_told_once_when_it_shows_and_at_the_end(tmp_path, capsys):
    world = World(tmp_path, num_steps=12, rate=0.0)
    (concern,) = world.run()[1]["warnings"]
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if "health/stuck_steps" in line]
    assert told[0].startswith("warning: test: step 6: nothing has changed for 5 steps")
    assert len(told) == 2 and concern in told[1] and "step 6" in concern


def test_the_progress_shows_what_tells_most_and_no_time_left_at_first(capsys, monkeypatch):
    clock = iter([100.0, 101.0, 102.0])  # the first step came after minutes of compilation
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Progress, "_EVERY", 0.0)
    progress = Progress("ppo", 9, start=0, enabled=True)
    row = {"loss/policy": 0.5, "loss/value": 2.0, "objective/scores": 1.25, "objective/kl": 0.5, "grad_norm": 1.0}
    for step in (1, 2, 3):
        progress.update(step, headline(row), 10.0)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("ppo") and first.endswith("10 tokens/s")
    assert all(part in first for part in ("1/9", "loss 0.5", "objective/scores 1.25", "objective/kl 0.5"))
    assert second.endswith("10 tokens/s  7s left") and third.endswith("  6s left")


def test_a_resume_tells_the_same_signs_no_second_time():
    past = [{"step": n, "loss": 0.5, "grad_norm": 1.0} for n in range(1, 9)]
    health = Health(past)
    assert health.news(9, health.signs({"loss": 0.5, "grad_norm": 1.0})) == []
    assert "health/stuck_steps 5 at step 6" in health.concern()
    assert health.news(10, health.signs({"loss": 0.25, "grad_norm": 99.0})) == [
        "the gradient is 99 times as large as it was (health/grad_norm_jump)"
    ]
    health.signs({"loss": 0.25, "grad_norm": 0.0})
    assert "the gradient is 0 at the end" in health.concern()
    assert Health([{"step": n, "loss": 0.6931 + 0.002 * n} for n in range(8)]).concern() == ""  # noise


def test_a_fall_of_the_log_probs_is_told_without_a_second_minus():
    (said,) = Health().news(40, {"health/chosen_logps_change": -1344.0})
    assert "by 1344 nats" in said

"""A disk that fills up: told with its path, nothing lost, no half of a file taken for a whole one.

A limit on the size of files stands for the disk: the kernel refuses writes at the same places, to Python and to C++,
whoever runs the tests.
"""

import contextlib
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from loop_world import World

from jaxalign.disk import trouble, write_whole
from jaxalign.errors import InputError
from jaxalign.train.checkpoints import Checkpoints, _remove_half_written
from jaxalign.train.metrics import Writer, read_metrics
from jaxalign.train.rundir import RunDir
from jaxalign.types import TrainState
from tests.models import tiny_models as tiny

LIMIT = 1 << 16  # bytes of a file


@contextlib.contextmanager
def full_disk(limit=LIMIT):
    """No file of this process grows beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def refused(path):
    """What is written in the block does not fit, and is told so."""
    with full_disk(), pytest.raises(InputError) as error:
        yield error
    assert str(path) in error.value.found and "File too large" in error.value.found
    assert "saved before" in error.value.expected and "same command" in error.value.fix


def left(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    for path in (tmp_path / "a.json", epath.Path(tmp_path / "b.json")):
        write_whole(path, "old")
        with refused(path):
            write_whole(path, "x" * (LIMIT + 1))
        assert path.read_text() == "old"
    assert left(tmp_path) == ["a.json", "b.json"]


def test_every_way_of_telling_it_is_known():
    assert trouble(OSError(28, "x")) and trouble(OSError(122, "x")) and trouble(OSError(30, "x"))
    assert trouble(OSError("1000 requested and 24 written"))  # numpy
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [OS error 28]")
    assert trouble(ExceptionGroup("several", [wrapped])) == "No space left on device"
    assert trouble(ValueError("RESOURCE_EXHAUSTED: Out of memory")) is None and trouble(OSError(2, "x")) is None


def test_run_files(tmp_path):
    run = RunDir(str(tmp_path))
    run.write_json("config.json", {"a": 1})
    for name in ("config.json", "DONE", "data_report.json"):
        with refused(tmp_path / name):
            run.write_json(name, {"a": "x" * LIMIT})
    assert left(tmp_path) == ["config.json"] and run.read_json("config.json") == {"a": 1}


def test_metrics(tmp_path):
    config = World(tmp_path).config
    run = RunDir(str(tmp_path))
    writer = Writer(run, config.logging, start=0, config={})
    writer.write(1, {"loss": 1.0})
    with refused(run.metrics):
        writer.write(2, {f"name{i}": 1.0 for i in range(10_000)})
    with contextlib.suppress(InputError):  # what a failed write left may fit by now
        writer.close()
    writer = Writer(run, config.logging, start=1, config={})
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [row["loss"] for row in read_metrics(run)] == [1.0, 2.0]


def test_tensorboard_events(tmp_path):
    config = World(tmp_path).config
    config.logging.trackers = ("tensorboard",)
    run = RunDir(str(tmp_path))
    writer = Writer(run, config.logging, start=0, config={})
    with refused(run.events):
        for step in range(1000):  # more than fits, and than a queue would hold
            writer.write(step, {"figure": 1.0, "another": 2.0})
    with contextlib.suppress(InputError):
        writer.close()
    assert len(read_metrics(run)) > 100


@pytest.mark.parametrize("when", ["saving", "waiting", "closing"])
def test_checkpoints(tmp_path, when):
    """The earlier one stays, though one is to be kept, and the next run goes on from it."""

    def state(step, size):
        params = {"w": jnp.asarray(np.random.default_rng(step).random(size), jnp.float32)}
        return TrainState(jnp.int32(step), params, {}, {}, jnp.int32(step))

    checkpoints = Checkpoints(tmp_path, keep=1)

    def save(step, size):
        checkpoints.save(step, state(step, size), {}, {}, checkpoints.checked(step, state(step, size)))

    save(1, 10)
    checkpoints.wait()
    with refused(tmp_path):
        save(2, LIMIT)
        if when == "saving":
            save(3, 10)
            checkpoints.wait()
        elif when == "waiting":
            checkpoints.wait()
        else:
            checkpoints.close()
    with contextlib.suppress(InputError):
        checkpoints.close()
    assert "2" not in os.listdir(tmp_path) and not list(tmp_path.glob("*tmp*"))
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() in ((1, 3) if when == "saving" else (1,))
    checkpoints.close()


def test_what_is_still_being_written_is_removed_too(tmp_path, monkeypatch):
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    late, remove = iter([True, True, False]), shutil.rmtree

    def removing(path, **options):
        remove(path, **options)
        if next(late):  # a thread that was not done
            (half / "state").mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", removing)
    _remove_half_written(tmp_path)
    assert not half.exists() and next(late, None) is None


def test_a_run_whose_checkpoint_does_not_fit_goes_on_from_the_last_one(tmp_path):
    World(tmp_path, num_steps=4, checkpoint__every=2).run()
    before = left(tmp_path / "checkpoints" / "4")
    world = World(tmp_path, num_steps=6, checkpoint__every=2)
    with full_disk(64), pytest.raises(InputError, match="File too large"):
        world.run()
    assert left(tmp_path / "checkpoints" / "4") == before
    state, _ = World(tmp_path, num_steps=6, checkpoint__every=2).run()
    assert int(state.data_cursor) == 6
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 7)
    ]


def test_samples(tmp_path):
    from types import SimpleNamespace

    from jaxalign.train.samples import Sampler

    config = SimpleNamespace(logging=SimpleNamespace(num_samples=1), rollout=SimpleNamespace(num_samples=1))
    sampler = Sampler(SimpleNamespace(config=config, directory=RunDir(str(tmp_path))))
    with refused(tmp_path / "samples"):
        sampler(None, {}, 5, [{"text": "x" * LIMIT}])
    assert left(tmp_path) == []


def test_reference_cache(tmp_path):
    from jaxalign.train.reference import ReferenceCache

    cache = ReferenceCache(epath.Path(tmp_path), {"model": "m"}, LIMIT)
    with refused(cache.path):
        cache.write(np.random.default_rng(0).random((LIMIT, 2)).astype(np.float32))
    assert left(tmp_path) == []


def test_token_cache(tmp_path):
    from jaxalign.data.cache import open_or_write
    from jaxalign.data.records import Record
    from jaxalign.data.tokenize import Example

    def examples(counts):
        for i in range(3):
            tokens = np.full(LIMIT // 2, i, np.int32)
            record = Record(i, "file", i, "completion", prompt=f"p{i}", completion="c")
            yield record, Example(i, tokens, (tokens,), (tokens > 0,), (True,), 1.0, 0.0)

    with refused(tmp_path):
        open_or_write(tmp_path, "key", examples)
    assert left(tmp_path) in ([], ["key.lock"])


def test_records_that_wait_on_disk(tmp_path):
    from jaxalign.data.mixture import load_records

    (tmp_path / "a.jsonl").write_text(f'{{"text": "{"x" * 9000}"}}\n' * 1000)
    with refused(tmp_path):
        load_records(str(tmp_path / "a.jsonl"), None, directory=tmp_path / "not" / "yet")
    assert left(tmp_path) == ["a.jsonl"]


def test_export(tmp_path):
    from jaxalign.models.export import save

    model = tiny.model()
    params = model.init(jax.random.key(0))
    target = tmp_path / "export"
    save(target, model, params)
    before = {name: (target / name).read_bytes() for name in left(target)}
    with refused(target):
        save(target, model, params)
    assert {name: (target / name).read_bytes() for name in left(target)} == before
    assert os.listdir(tmp_path) == ["export"]


def test_trap_a_device_a_pipe_and_a_link_are_written_to_and_not_replaced(tmp_path):
    """`--out /dev/null` as root put a file in the device's place."""
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)
    file.write_text("old")
    link.symlink_to(file)
    write_whole(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "pipe"]

"""A disk without room for a checkpoint is told before the first step."""

import errno
import json
import shutil
from collections import namedtuple
from types import SimpleNamespace

import jax
import pytest
from run_child import make_config, stories

from jaxalign.errors import InputError
from jaxalign.train import room, trainer

Usage = namedtuple("Usage", "total used free")
MIB = 1 << 20


@pytest.fixture
def run(shared, tmp_path, monkeypatch):
    """A run, or a dry run, on a disk with so many bytes free; a checkpoint of its model takes 3 MiB."""

    def run(free, dry_run=False, **fields):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path: Usage(100 * MIB, 0, free))
        monkeypatch.setattr(trainer.Stage, "frozen", None)  # nothing is trained
        (tmp_path / "d.jsonl").write_text(json.dumps({"text": "Once upon a time"}) + "\n")
        fields = {"data.sources": (str(tmp_path / "d.jsonl"),), "data.cache_dir": None} | fields
        config = make_config(stories(shared, tmp_path / "run", "sft", **fields))
        return trainer.run(config, dry_run=dry_run, devices=jax.devices()[:1])

    return run


@pytest.mark.parametrize("dry_run", [True, False])
def test_no_room_for_one_checkpoint_is_refused(run, dry_run, tmp_path):
    with pytest.raises(InputError, match=r"1\.0 MiB free") as error:
        run(MIB, dry_run)
    assert "a checkpoint takes up to 3.0 MiB" in error.value.found and "df -h" in error.value.fix
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()


def test_room_for_fewer_than_are_kept_is_a_warning(run, capsys):
    run(5 * MIB, True)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "free in" in line)
    assert said.startswith("warning: ") and "together 6.9 MiB" in said
    run(8 * MIB, True)
    run(8 * MIB, True, **{"checkpoint.keep": 1})
    assert "free in" not in capsys.readouterr().out
    run(8 * MIB, True, **{"checkpoint.keep": 5})
    assert "free in" in capsys.readouterr().out


def test_no_checkpoint_by_time_takes_the_room_of_the_last(shared, tmp_path, monkeypatch, capfd):
    def usage(path):
        used = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
        return Usage(5 * MIB, used, 5 * MIB - used)

    monkeypatch.setattr(room.shutil, "disk_usage", usage)
    fields = {"num_train_steps": 3, "checkpoint.every": 0, "checkpoint.every_minutes": 1e-6}
    trainer.run(make_config(stories(shared, tmp_path / "run", "sft", **fields)), devices=jax.devices()[:1])
    assert capfd.readouterr().err.count("no checkpoint by time") == 1
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]


def a_stage(tmp_path, keep):
    """A stage whose checkpoint takes a MiB, its export half of that."""
    (tmp_path / "checkpoints").mkdir()
    params = {"policy": jax.ShapeDtypeStruct((MIB // 8,), "float32")}
    return SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep=keep, best_metric=None)),
        directory=SimpleNamespace(path=tmp_path, checkpoints=tmp_path / "checkpoints", remote=False),
        like=SimpleNamespace(params=params, opt={"policy": jax.ShapeDtypeStruct((MIB // 8,), "float32")}),
        program=SimpleNamespace(exported="policy"),
    )


@pytest.mark.parametrize("keep, saved, needed", [(1, 0, 2), (1, 1, 1), (3, 0, 2.5), (3, 2, 2), (3, 3, 1), (3, 9, 1)])
def test_the_room_for_a_checkpoint_by_time(keep, saved, needed, tmp_path, monkeypatch):
    stage = a_stage(tmp_path, keep)
    for short in (0, 1):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, x=short: Usage(100 * MIB, 0, needed * MIB - x))
        assert bool(room.against_saving(stage, saved)) is bool(short)


@pytest.mark.parametrize("keep, whole, needed", [(1, 0, 1.75), (1, 1, 0.75), (2, 2, 0.75), (3, 1, 2.75)])
def test_a_checkpoint_that_is_being_written_is_not_there_yet(keep, whole, needed, tmp_path, monkeypatch):
    """A quarter of it is; where all that are kept were there, one of them goes when it is complete."""
    stage = a_stage(tmp_path, keep)
    for step in range(whole):
        (tmp_path / "checkpoints" / str(step)).mkdir()
    half = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    (half / "d").write_bytes(bytes(MIB // 4))
    for short in (0, 1):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, x=short: Usage(100 * MIB, 0, needed * MIB - x))
        assert bool(room.against_saving(stage, min(whole + 1, keep))) is bool(short)


def test_room_that_cannot_be_read_is_told_and_training_goes_on(shared, tmp_path, monkeypatch, capfd):
    def gone(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(room.shutil, "disk_usage", gone)
    fields = {"num_train_steps": 3, "checkpoint.every": 0, "checkpoint.every_minutes": 1e-6}
    trainer.run(make_config(stories(shared, tmp_path / "run", "sft", **fields)), devices=jax.devices()[:1])
    assert capfd.readouterr().err.count("Stale file handle") == 2  # before the first step, and when one was due
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]


def test_a_url_is_not_asked(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", None)
    assert room.check_room(SimpleNamespace(directory=SimpleNamespace(remote=True))) == []

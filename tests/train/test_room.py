"""A disk without room for a checkpoint is told before the first step."""

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


@pytest.mark.parametrize("keep, saved, needed", [(1, 0, 2), (1, 1, 1), (3, 0, 2.5), (3, 2, 2), (3, 3, 1), (3, 9, 1)])
def test_the_room_for_a_checkpoint_by_time(keep, saved, needed, tmp_path, monkeypatch):
    params = {"policy": jax.ShapeDtypeStruct((MIB // 8,), "float32")}
    stage = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep=keep, best_metric=None)),
        directory=SimpleNamespace(path=tmp_path, remote=False),
        like=SimpleNamespace(params=params, opt={"policy": jax.ShapeDtypeStruct((MIB // 8,), "float32")}),
        program=SimpleNamespace(exported="policy"),
    )
    for short in (0, 1):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path, x=short: Usage(100 * MIB, 0, needed * MIB - x))
        assert bool(room.against_saving(stage, saved)) is bool(short)


def test_a_url_is_not_asked(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", None)
    assert room.check_room(SimpleNamespace(directory=SimpleNamespace(remote=True))) == []

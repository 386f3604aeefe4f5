"""A finished run made longer: allowed where its past stays what it was."""

import json

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.errors import InputError
from jaxalign.train import trainer

CONSTANT = {"optimizer.schedule": "constant", "optimizer.warmup_steps": 3, "checkpoint.every": 0}


def train(shared, workdir, steps, algorithm="sft", **fields):
    fields = CONSTANT | {"num_train_steps": steps, "data.max_length": 64, "data.max_records": 16} | fields
    return trainer.run(make_config(stories(shared, workdir, algorithm, **fields)), devices=jax.devices()[:1])


def own_files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts}


def test_a_finished_run_made_longer_equals_one_that_was_as_long_from_the_start(shared, tmp_path):
    train(shared, tmp_path / "longer", 2)
    assert train(shared, tmp_path / "longer", 4)["steps"] == 4
    train(shared, tmp_path / "whole", 4)
    one, other = (load_file(tmp_path / w / "export" / "model.safetensors") for w in ("longer", "whole"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    rows = [json.loads(line) for line in (tmp_path / "longer" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]

    before = own_files(tmp_path / "longer")
    with pytest.raises(InputError, match="a run of 4 steps") as error:
        train(shared, tmp_path / "longer", 3)  # its past does not become shorter
    assert "num_train_steps" in error.value.fix
    with pytest.raises(InputError, match="schedule"):
        train(shared, tmp_path / "longer", 6, **{"optimizer.schedule": "cosine"})
    with pytest.raises(InputError, match="max_records"):
        train(shared, tmp_path / "longer", 6, **{"data.max_records": 20})
    assert before == own_files(tmp_path / "longer")  # a finished run that is refused stays finished


def test_more_data_than_the_first_run_had_is_refused_with_words(shared, tmp_path):
    """A file that grew is another run's data, however long the run is to be."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"Once there were {i} dogs."}) + "\n" for i in range(8)))
    fields = {"data.sources": (str(data),), "data.max_records": None}
    train(shared, tmp_path / "run", 1, **fields)
    with data.open("a") as file:
        file.write(json.dumps({"text": "Once there was a cat."}) + "\n")
    with pytest.raises(InputError, match=r"the records of data\.sources"):
        train(shared, tmp_path / "run", 2, **fields)
    assert (tmp_path / "run" / "DONE").exists()

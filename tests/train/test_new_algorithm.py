"""An algorithm is an entry and a builder, a form of records a row: nothing else knows of them."""

import jax
import numpy as np
import pytest

from jaxalign import config as configuration
from jaxalign.data import columns, forms, unmapped
from jaxalign.data.column_sets import COLUMN_SETS, ColumnSet
from jaxalign.registry import ALGORITHMS, Reads
from jaxalign.train import algorithms, trainer
from tests.train.run_child import make_config, stories

SETS = (*COLUMN_SETS, ColumnSet("single", ("prompt", "completion", "score"), (), lambda row: {
    "prompt": row["prompt"], "completion": row["completion"]
}))  # fmt: skip


@pytest.fixture
def labelled(monkeypatch):
    """SFT of completions that carry a number, a form of their own."""
    single = forms.Form("labelled completions", ("completion",), '{"prompt": "...", "completion": "...", "score": 1}')
    monkeypatch.setitem(forms.FORMS, "single", single)
    for module in (columns, unmapped):
        monkeypatch.setattr(module, "COLUMN_SETS", SETS)

    def fields():
        return {"algorithm": {"name": "labelled"}, "optimizer": {"learning_rate": 3e-5}}

    entry = ALGORITHMS["sft"]._replace(fields=fields, reads=Reads(("single",), score=True), guides=())
    monkeypatch.setitem(ALGORITHMS, "labelled", entry)
    monkeypatch.setitem(algorithms.BUILDERS, "labelled", algorithms.BUILDERS["sft"])
    choices = tuple(row for row in configuration.CHOICES if row[0] != "algorithm.name")
    monkeypatch.setattr(configuration, "CHOICES", choices)


def test_an_algorithm_of_a_new_form_is_configured_read_and_trained(labelled, shared, tmp_path):
    lines = [f'{{"prompt": "Say {i}:", "completion": " {"ab" * i}", "score": {i % 2}}}\n' for i in range(1, 9)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    spec = stories(shared, tmp_path / "run", "sft", num_train_steps=2, batch_size=2)
    spec["algorithm"] = "labelled"
    source = {"path": str(tmp_path / "data.jsonl"), "columns": {"score": "score"}}  # a score may mean anything
    spec["fields"]["data.sources"] = (source,)
    c = make_config(spec)
    assert configuration.defaults("labelled").optimizer.learning_rate == 3e-5
    assert configuration.validate(c) == []
    found = trainer.run(c, devices=jax.devices()[:1])
    assert found["steps"] == 2 and np.isfinite(found["metrics"]["loss"])


def test_data_of_other_forms_are_refused_with_words(labelled, shared, tmp_path):
    from jaxalign.data.mixture import load_records
    from jaxalign.errors import InputError

    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}\n')
    with pytest.raises(InputError, match="pairs") as error:
        load_records(str(tmp_path / "pairs.jsonl"), ALGORITHMS["labelled"].reads)
    assert "prompt + completion + score" in error.value.expected

"""`algorithm.use_margin` needs margins: their absence is told before a model is read."""

import json

import pytest

from jaxalign.config import defaults
from jaxalign.data.build import build
from jaxalign.errors import InputError
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.train import trainer

PAIR = {"prompt": "a b c", "chosen": "d e f", "rejected": "g h i"}


def config(shared, tmp_path, lines, held_out=None):
    c = defaults("reward")
    c.workdir, c.model.path = str(tmp_path / "run"), str(shared / "models" / "stories260k-llama")
    for name, rows in (("sources", lines), ("eval_sources", held_out)):
        if rows:
            file = tmp_path / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            c.data[name] = (str(file),)
    c.data.max_length, c.batch_size, c.num_train_steps = 32, 8, 1
    c.algorithm.use_margin = True
    c.logging.trackers, c.logging.progress = (), False
    return c


WITHOUT = {
    "no column": ([PAIR] * 8, None, "no `margin`"),
    "text": ([PAIR | {"margin": "slightly better"}] * 8, None, "slightly better"),
    "zeros": ([PAIR | {"margin": 0}] * 8, None, "has a margin"),
    "held-out": ([PAIR | {"margin": 1.5}] * 8, [PAIR] * 8, "data.eval_sources"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_data_without_margins_is_refused(case, shared, tmp_path):
    lines, held_out, found = WITHOUT[case]
    with pytest.raises(InputError, match=found) as error:
        trainer.run(config(shared, tmp_path, lines, held_out))
    assert "use_margin=False" in error.value.fix and not (tmp_path / "run" / "checkpoints").exists()


def test_some_margins_are_enough(shared, tmp_path):
    lines = [PAIR | {"margin": float(i == 3)} for i in range(8)]
    found = trainer.run(config(shared, tmp_path, lines), dry_run=True)
    assert not any("margin" in said for said in found["data"]["warnings"])


def test_a_source_without_margins_is_named(shared, tmp_path, capsys):
    c = config(shared, tmp_path, [PAIR | {"margin": 1.0}] * 8)
    (tmp_path / "plain.jsonl").write_text(json.dumps(PAIR | {"prompt": "x"}) + "\n")
    c.data.sources += ({"path": str(tmp_path / "plain.jsonl"), "weight": 2},)
    trainer.run(c, dry_run=True)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "use_margin" in line)
    assert said.startswith("warning: ") and f"no record of {tmp_path / 'plain.jsonl'} has a margin" in said


def test_a_held_out_share_may_have_no_margin(shared, tmp_path):
    """Which of the records are held out is chance, and the training data have margins."""
    lines = [PAIR | {"prompt": f"a b {i}", "margin": float(i < 4)} for i in range(40)]
    c = config(shared, tmp_path, lines)
    c.data.eval_fraction, c.seed = 0.1, 1
    margins = build(c, load_tokenizer(c.model.path), "eval").lengths()["score"]
    assert len(margins) and not margins.any(), "this seed's are without"
    trainer.run(c, dry_run=True)

"""`jaxalign evaluate`: the figures of training's own evaluations, without training."""

import json
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.evaluate.calibration import calibration
from tests.train.run_child import make_config, stories


@pytest.fixture
def one_device(monkeypatch):
    """One device: a program for eight virtual ones takes long to compile."""
    import jaxalign.pipeline.evaluate as module

    make_mesh = module.make_mesh
    monkeypatch.setattr(module, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [
        {"prompt": f"Once upon a time number {i}", "chosen": " there was a cat." * (1 + i % 3), "rejected": " no." * 2}
        for i in range(13)
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def evaluated(capsys, *argv):
    assert main(["evaluate", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo"])
def test_figures_are_those_of_training(algorithm, shared, tmp_path, pairs, capsys, one_device):
    from jaxalign.train import trainer

    model = str(shared / "models" / "stories260k-llama")
    data = pairs
    if algorithm == "sft":
        data = str(tmp_path / "texts.jsonl")
        rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
        lines = (json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in rows)
        (tmp_path / "texts.jsonl").write_text("".join(lines))
    fields = {
        "data.sources": (data,), "data.eval_sources": (data,), "data.max_records": None, "num_train_steps": 2,
        "checkpoint.every": 0, "eval.every": 2, "optimizer.learning_rate": 1e-3, "grad_accum_steps": 2,
    }  # fmt: skip
    run = tmp_path / "run"
    done = trainer.run(make_config(stories(shared, run, algorithm, **fields)), devices=jax.devices()[:1])
    beside = ["--reference", model] if algorithm == "dpo" else []
    flags = ["--max_length=128", "--truncation=keep_start"]
    flags += ["--max_prompt_length=100"] if algorithm == "dpo" else []
    flags += ["--batch_size=6", "--grad_accum_steps=3"] if algorithm == "reward" else []
    found = evaluated(capsys, "--model", str(run / "export"), "--data", data, *beside, *flags)
    figures = found["figures"]
    expected = {name.removeprefix("eval/"): value for name, value in done["eval"].items()}
    shared_names = expected.keys() & figures.keys()
    assert {"loss"} <= shared_names and (
        algorithm == "sft" or {"rewards/accuracies", "rewards/margins"} <= shared_names
    )
    for name in shared_names:
        np.testing.assert_allclose(figures[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert found["records"]["used"] == 13
    if algorithm == "sft":
        assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    else:
        assert sum(b["weight"] for b in found["calibration"]) == found["num_pairs"] == 13
        assert 0 <= figures["calibration/ece"] <= 1


def test_a_run_without_a_reference_and_with_two_losses(shared, tmp_path, pairs, capsys, one_device):
    """ORPO: one model in memory, the parts of its loss in the metrics, and the figures of its evaluation."""
    from jaxalign.train import trainer

    fields = {
        "data.sources": (pairs,), "data.eval_sources": (pairs,), "data.max_records": None, "num_train_steps": 2,
        "checkpoint.every": 0, "eval.every": 2, "optimizer.learning_rate": 1e-3, "grad_accum_steps": 2,
        "algorithm.loss": "orpo", "algorithm.reference": "none", "algorithm.extra_losses": (("sft", 0.5),),
    }  # fmt: skip
    run = tmp_path / "run"
    done = trainer.run(make_config(stories(shared, run, "dpo", **fields)), devices=jax.devices()[:1])
    expected = {name.removeprefix("eval/"): value for name, value in done["eval"].items()}
    parts = [expected[f"term/policy/{name}"] for name in ("orpo", "sft")]
    assert expected["loss"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5) and min(parts) > 0
    flags = ["--max_length=128", "--truncation=keep_start", "--max_prompt_length=100", "--loss=orpo"]
    flags.append('--extra_losses=(("sft", 0.5),)')
    figures = evaluated(capsys, "--model", str(run / "export"), "--data", pairs, *flags)["figures"]
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_pairs_without_a_reference_and_a_file(shared, tmp_path, pairs, capsys, one_device):
    model, out = str(shared / "models" / "stories260k-llama"), tmp_path / "e.json"
    assert main(["evaluate", "--model", model, "--data", pairs, "--out", str(out)]) == 0
    page = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert "perplexity of the chosen" in page and "higher log-prob" in page
    assert {"logps/accuracies", "perplexity/chosen", "perplexity/rejected"} <= found["figures"].keys()
    assert "calibration" not in found


def test_columns_are_mapped_as_in_training(shared, tmp_path, capsys, one_device):
    file = tmp_path / "mine.csv"
    file.write_text("q,better,worse\n" + "".join(f"ask {i},a cat, a dog\n" for i in range(4)))
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    source = json.dumps([{"path": str(file), "columns": columns}])
    assert main(["evaluate", "--model", str(shared / "models" / "stories260k-llama"), "--data", source]) == 0
    page = capsys.readouterr().out
    assert f"on {file}" in page and "perplexity of the chosen" in page


PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.mark.parametrize(
    "rows, flags, words",
    [
        ([{"prompt": "a"}], [], "prompts without answers"),
        ([{"prompt": "a", "completion": "b"}], ["--reference", "MODEL"], "--reference with data without pairs"),
        ([{"prompt": "a", "completion": "b"}], ["--optimizer.learnin_rate=1"], "learning_rate"),
        ([{"prompt": "a", "completion": "b"}], ["--out", "/no/such/dir/e.json"], "--out"),
        ([{"prompt": "a b c d", "completion": "b"}], ["--max_length=2"], "max_length"),
        ([PAIR], ["--reference", "MODEL", "--algorithm.reference=cached"], "--algorithm.reference=cached"),
        ([PAIR], ["--reference_path=MODEL"], "--reference DIR"),
        ([PAIR] * 5, ["--eval_fraction=0.4"], "--data.eval_fraction"),
    ],
)
def test_wrong_input_is_told_in_words(shared, tmp_path, capsys, rows, flags, words, one_device):
    model = str(shared / "models" / "stories260k-llama")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [flag.replace("MODEL", model) for flag in flags]
    assert main(["evaluate", "--model", model, "--data", str(data), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and "--config." not in err


def test_better_and_worse_are_proposed_as_the_sides_of_a_pair(shared, tmp_path, capsys):
    data, model = tmp_path / "d.jsonl", str(shared / "models" / "stories260k-llama")
    data.write_text(json.dumps({"question": "Q", "better": "A", "worse": "B"}))
    assert main(["evaluate", "--model", model, "--data", str(data)]) == 2
    (flag,) = shlex.split(capsys.readouterr().err.partition("fix:      ")[2])
    (source,) = json.loads(flag.removeprefix("--data="))
    assert source["columns"] == {"prompt": "question", "chosen": "better", "rejected": "worse"}


def test_calibration_by_a_loop():
    rng = np.random.default_rng(0)
    margins, weights = rng.normal(size=200) * 2, rng.integers(0, 3, 200)
    sums = {}
    for m, w in zip(margins, weights):
        p = 1 / (1 + np.exp(-m))
        confidence = max(p, 1 - p)
        entry = sums.setdefault(min(int((confidence - 0.5) * 20), 9), [0, 0.0, 0.0])
        entry[0] += w
        entry[1] += w * confidence
        entry[2] += w * (m > 0)
    expected = sum(abs(c - a) for w, c, a in sums.values() if w) / weights.sum()
    assert calibration(margins, weights)[0] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(calibration([np.nan, 1.0])[0]) and calibration([np.nan, 0.0], [0, 1])[0] == 0
    assert np.isnan(calibration([])[0]) and calibration([0.0])[0] == 0

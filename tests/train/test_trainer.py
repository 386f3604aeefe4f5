"""Whole stages on a real model, in this process: devices, accumulation, references, results."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.parallel.mesh import make_mesh
from jaxalign.pipeline import stages
from jaxalign.plan.stages import make_stage
from jaxalign.train import dryrun, trainer
from jaxalign.train.arguments import step_arguments
from jaxalign.train.best import eval_metrics

DOUBLES = {"model.dtype": "float64", "model.param_dtype": "float64"}


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train(shared, workdir, algorithm, devices=1, **fields):
    fields = {"num_train_steps": 3, "checkpoint.every": 0} | fields
    return trainer.run(make_config(stories(shared, workdir, algorithm, **fields)), devices=jax.devices()[:devices])


def test_devices_and_accumulation_change_nothing(shared, tmp_path, x64):
    common = DOUBLES | {"batch_size": 16, "data.max_length": 64, "data.max_records": 60}
    runs = {
        "one": {"devices": 1},
        "eight": {"devices": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "grad_accum_steps": 2},
    }
    for name, options in runs.items():
        results = train(shared, tmp_path / name, "sft", **common, **options)
        assert results["num_compiles"] == 1
    one, eight = (metrics_of(tmp_path / name) for name in runs)
    for a, b in zip(one, eight, strict=True):
        for key in ("loss", "grad_norm", "param_norm", "update_norm", "weight", "learning_rate"):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-9, err_msg=key)
    a, b = (load_file(tmp_path / name / "export" / "model.safetensors") for name in runs)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_trap_reference_is_the_start_live_and_cached(shared, tmp_path):
    live = train(shared, tmp_path / "live", "dpo", **{"logging.samples_every": 2, "rollout.max_new_tokens": 8})
    first = metrics_of(tmp_path / "live")[0]
    assert all(first[f"rewards/{k}"] == 0.0 for k in ("chosen", "rejected", "margins"))  # exactly
    assert live["model_bytes"]["ref"] == live["model_bytes"]["policy"]
    samples = [json.loads(line) for line in (tmp_path / "live" / "samples" / "2.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and {"step", "record", "prompt", "completion", "finished"} <= samples[0].keys()
    sampled = metrics_of(tmp_path / "live")[2]
    assert 0 <= sampled["samples/distinct_2"] <= 1 and abs(sampled["samples/kl"]) < 1

    cached = {"algorithm.reference": "cached"}
    results = train(shared, tmp_path / "cached", "dpo", **cached)
    beta, rows = 0.1, metrics_of(tmp_path / "cached")
    for name in ("chosen", "rejected"):
        assert abs(rows[0][f"rewards/{name}"]) <= beta * 1e-3  # 1e-3 nats
    live_rows = [r for r in metrics_of(tmp_path / "live") if "loss" in r]
    np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in live_rows], rtol=1e-4)
    assert "ref" not in results["model_bytes"]

    # the same model, data and tokenizer: nothing is computed again
    (table,) = tmp_path.rglob("reference-*.npz")
    written = table.stat().st_mtime_ns
    train(shared, tmp_path / "again", "dpo", **cached)
    assert table.stat().st_mtime_ns == written and list(tmp_path.rglob("reference-*.npz")) == [table]


def test_what_the_data_report_warns_of_is_told_before_the_first_step(shared, tmp_path, capsys):
    train(shared, tmp_path / "run", "reward", **{"num_train_steps": 1, "logging.progress": True})
    lines = capsys.readouterr().err.splitlines()
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    told = [line for line in lines if line.startswith("warning: data: ")]
    assert told == [f"warning: data: {w}" for w in report["warnings"]] and "pairs; guides" in "".join(told)
    assert lines.index(told[-1]) < next(i for i, line in enumerate(lines) if "step 1/1" in line)


def test_reward_model_run_and_its_results(shared, tmp_path):
    fields = {"data.eval_fraction": 0.25, "eval.every": 2, "logging.trackers": ("tensorboard",)}
    workdir = tmp_path / "run"
    results = train(shared, workdir, "reward", **fields)
    assert {"loss", "rewards/accuracies", "learning_rate", "tokens_per_second"} <= results["metrics"].keys()
    assert "eval/rewards/accuracies" in results["eval"] and results["num_compiles"] == 1
    assert json.loads((workdir / "export" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "data_report.json", "checkpoints", "metrics.jsonl", "events", "export", "DONE"} <= names
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns
    again = train(shared, workdir, "reward", **fields)
    assert again["metrics"] == results["metrics"]  # done: nothing is trained again
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


def test_dry_run_reports_and_trains_nothing(shared, tmp_path, capsys):
    fields = {"data.eval_fraction": 0.3, "batch_size": 64, "algorithm.beta": 3.0}
    spec = stories(shared, tmp_path / "run", "dpo", **fields)
    with pytest.warns(UserWarning, match="beta is 3"):
        found = trainer.run(make_config(spec), dry_run=True, devices=jax.devices()[:1])
    out = capsys.readouterr().out
    assert len(found["rows"]) == 3 and "⟦" in found["rows"][0] and "chosen" in found["rows"][0]
    assert found["steps"] == 8 and found["memory"]["total"] > 0 and found["model_bytes"]["ref"] > 0
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "config.json").exists()

    assert re.search(r"a training step needs \d+\.\d MiB on each device: arguments \d+\.\d MiB, ", out)
    assert "{" not in out.replace("".join(found["rows"]), "") and "8 steps of 64 rows, 8 updates" in out
    # what a source gives is what is trained on and what is held out
    records = json.loads((tmp_path / "run" / "data_report.json").read_text())["records"]
    held_out, used = records["held_out"], records["used"]
    assert held_out > 0 and held_out + used + sum(records["dropped"].values()) == records["sources"][0]["used"]
    assert f"held out {held_out} of them for evaluation, {used} to train on" in out
    # what needs a person's eye comes last
    *_, rows, batch, where = out.splitlines()
    assert where.endswith("run/data_report.json") and rows.startswith("warning: data: ")
    last = out.splitlines()[-1 - len(found["warnings"]) : -1]
    assert last == [f"warning: {said}" for said in found["warnings"]]
    assert any("algorithm.beta is 3" in line for line in last)  # again, where it is seen
    assert f"a batch has 64 rows and the data fill only {used}" in batch and "--config.batch_size=16" in batch
    assert out.index("data:") < out.index("row 2") < out.index("a training step needs") < out.index("warning: data")


def test_a_dry_run_says_how_the_weights_lie_in_sampling(shared, tmp_path):
    c = defaults("ppo")
    c.model.path, c.data.sources = str(shared / "models" / "stories260k-llama"), ("owner/name",)
    c.rewards.function, c.rollout.tensor = "rewards.py:of", 2
    c.data.max_length, c.rollout.max_new_tokens, c.batch_size, c.algorithm.num_minibatches = 16, 8, 4, 1
    stage, _ = make_stage(c, jax.devices()[:2], str(tmp_path))
    said = dryrun.sampling(stage, step_arguments(stage)[1])
    for words in ("split over 2 devices", "rollout.tensor=2", "weights", "cache", "beside"):
        assert words in said
    assert re.search(r"weights \d+\.\d KiB|weights \d+\.\d MiB", said)


def test_a_dry_run_where_a_run_is_refuses_what_training_refuses_and_leaves_its_report(shared, tmp_path):
    fields = {"num_train_steps": 1, "checkpoint.every": 0, "batch_size": 8}
    workdir = tmp_path / "run"
    train(shared, workdir, "sft", **fields)
    before = (workdir / "data_report.json").stat().st_mtime_ns
    stages.run(make_config(stories(shared, workdir, "sft", **fields)), dry_run=True)
    assert (workdir / "data_report.json").stat().st_mtime_ns == before
    other = make_config(stories(shared, workdir, "sft", **fields, **{"optimizer.learning_rate": 0.5}))
    with pytest.raises(InputError, match="learning_rate"):
        stages.run(other, dry_run=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_anew(shared, tmp_path, capsys):
    fields, workdir = {"num_train_steps": 1, "batch_size": 8}, tmp_path / "run"
    train(shared, workdir, "sft", **fields)
    said = capsys.readouterr().err
    assert "begins anew" not in said and "warning: 1 update in all, of 8 rows" in said
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "DONE").unlink()
    train(shared, workdir, "sft", **fields)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no checkpoint" in line]
    assert "training begins anew" in line
    assert [row["step"] for row in metrics_of(workdir)] == [1]


@pytest.mark.parametrize("dry_run", [True, False])
def test_refused_data_leave_no_directory_behind(shared, tmp_path, dry_run):
    data = tmp_path / "late.jsonl"
    data.write_text('{"text": "Once"}\n' * 40 + '{"story": "Once"}\n')
    for made in (False, True):
        workdir = tmp_path / f"run{made}"
        if made:
            workdir.mkdir()
        spec = stories(shared, workdir, "sft", **{"data.sources": (str(data),), "data.max_records": None})
        with pytest.raises(InputError, match=":41: no"):
            trainer.run(make_config(spec), dry_run=dry_run, devices=jax.devices()[:1])
        assert workdir.exists() == made  # one that was there stays


def test_a_batch_that_the_mesh_does_not_divide_is_refused_first(shared, tmp_path):
    with pytest.raises(InputError, match="batch_size=8"):
        train(shared, tmp_path / "run", "sft", devices=8, batch_size=4)


def test_a_split_that_the_mesh_has_not_is_refused_before_training(shared, tmp_path):
    config = make_config(stories(shared, tmp_path / "run", "dpo", **{"rollout.tensor": 3, "logging.samples_every": 3}))
    with pytest.raises(InputError, match=r"rollout\.tensor is 3 on a mesh of fsdp=2"):
        trainer.run(config, devices=jax.devices()[:2])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ppo"])
def test_the_best_metric_is_checked_before_anything_is_trained(algorithm, shared, tmp_path, monkeypatch):
    from jaxalign.train.stage import Stage

    monkeypatch.setattr(Stage, "start", None)  # weights are not even loaded
    fields = {"data.eval_fraction": 0.2, "eval.every": 2, "checkpoint.best_metric": "eval/bogus"}
    with pytest.raises(InputError, match=r"best_metric is 'eval/bogus'") as error:
        train(shared, tmp_path / "run", algorithm, **fields)
    known = {"sft": "eval/loss", "dpo": "eval/rewards/accuracies", "ppo": "eval/objective/scores"}[algorithm]
    assert known in error.value.expected and "eval/" in error.value.fix
    assert "eval.every" not in error.value.found
    with pytest.raises(InputError, match="only its end is evaluated") as error:
        train(shared, tmp_path / "rare", algorithm, **fields | {"eval.every": 100})
    assert "best_metric is 'eval/bogus'" in error.value.found and "--config.eval.every=" in error.value.fix
    with pytest.raises(InputError, match="nothing to evaluate on"):
        train(shared, tmp_path / "none", algorithm, **fields | {"data.eval_fraction": 0.0})
    with pytest.raises(TypeError):  # a name that is right goes on, to the weights
        train(shared, tmp_path / "right", algorithm, **fields | {"checkpoint.best_metric": known.removeprefix("eval/")})


def test_evaluations_measure_what_the_check_of_names_expects(shared, tmp_path):
    fields = {"data.eval_fraction": 0.2, "eval.every": 1, "num_train_steps": 1}
    for algorithm in ("sft", "dpo", "ppo", "reward"):
        found = train(shared, tmp_path / algorithm, algorithm, **fields)["eval"]
        config = make_config(stories(shared, tmp_path / algorithm, algorithm, **fields))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            stage = trainer.Stage(config, mesh, trainer.RunDir(config.workdir))
            assert set(found) == {f"eval/{name}" for name in eval_metrics(stage)}


def test_a_foreign_file_where_the_export_goes_is_refused_before_training(shared, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "export").mkdir(parents=True)
    (workdir / "export" / "thesis.txt").write_text("mine")
    config = make_config(stories(shared, workdir, "sft", batch_size=8))
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"thesis\.txt") as error:
            trainer.run(config, dry_run=dry_run)
        assert f"mv {workdir / 'export'} " in error.value.fix and f"workdir={tmp_path / 'run-2'}" in error.value.fix
    assert not (workdir / "data_report.json").exists() and not (workdir / "metrics.jsonl").exists()


@pytest.mark.parametrize("stop", [(10**6,), ("two words",)])
def test_a_stop_token_that_the_tokenizer_does_not_have_is_refused(shared, stop):
    from jaxalign.models.tokenizer import load_tokenizer
    from jaxalign.train.stage import more_stops

    tokenizer = load_tokenizer(shared / "models" / "stories260k-llama")
    assert more_stops((5, "</s>"), tokenizer) == (5, 2)
    with pytest.raises(InputError, match=r"rollout\.stop"):
        more_stops(stop, tokenizer)

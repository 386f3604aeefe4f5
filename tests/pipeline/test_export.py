"""Export of a real, tiny run."""

import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxalign
from jaxalign.cli import main
from jaxalign.config import defaults, stages
from jaxalign.pipeline import stages as pipeline
from jaxalign.pipeline.configfile import load_config
from jaxalign.train import checkpoints
from jaxalign.train.card import model_card
from jaxalign.train.rundir import RunDir


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    """SFT for three steps with a checkpoint after each, as a stage; the learning rate makes the first the best."""
    shared = request.getfixturevalue("shared")
    folder = tmp_path_factory.mktemp("export")
    data = folder / "d.jsonl"
    lines = [{"prompt": "Once", "completion": f" upon a time there were {i} dogs."} for i in range(16)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = defaults("sft")
    c.model.path = str(shared / "models" / "stories260k-llama")
    c.model.remat = "none"
    c.data.sources = c.data.eval_sources = (str(data),)
    c.data.max_length = 32
    c.batch_size, c.num_train_steps = 8, 3
    c.optimizer.learning_rate, c.optimizer.schedule = 1.0, "constant"
    c.eval.every, c.eval.num_batches = 1, 1
    c.checkpoint.every, c.checkpoint.keep, c.checkpoint.best_metric = 1, 3, "loss"
    c.logging.trackers, c.logging.progress = (), False
    results = pipeline.run(stages(str(folder / "run"), sft=c), log=lambda line: None)
    assert results["sft"]["steps"] == 3
    return folder / "run"


def weights(path):
    return load_file(path / "model.safetensors")


def test_the_best_is_what_the_run_exported_and_the_last_is_not(run, tmp_path, capsys):
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "best"), "--checkpoint", "best"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'best'}\n"
    assert main(["export", "--workdir", str(run / "sft"), "--out", str(tmp_path / "last")]) == 0
    own, best, last = weights(run / "sft" / "export"), weights(tmp_path / "best"), weights(tmp_path / "last")
    assert all((own[k] == best[k]).all() for k in own)
    assert any((own[k] != last[k]).any() for k in own)
    for file in (run / "sft" / "export").iterdir():
        if file.suffix == ".json":
            assert file.read_bytes() == (tmp_path / "best" / file.name).read_bytes()


def test_a_checkpoint_by_its_number(run, tmp_path):
    for number in (2, 3):
        main(
            [
                "export",
                "--workdir",
                str(run),
                "--stage",
                "sft",
                "--checkpoint",
                str(number),
                "--out",
                str(tmp_path / str(number)),
            ]
        )
    main(["export", "--workdir", str(run), "--out", str(tmp_path / "last")])
    two, three, last = (weights(tmp_path / n) for n in ("2", "3", "last"))
    assert all((three[k] == last[k]).all() for k in last)
    assert any((two[k] != last[k]).any() for k in last)


def test_a_relative_workdir(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert main(["export", "--workdir", "run/sft", "--out", "../relative"]) == 0
    assert main(["export", "--workdir", "run/sft", "--out", str(tmp_path / "best"), "--checkpoint", "best"]) == 0
    assert (run.parent.parent / "relative" / "model.safetensors").exists()
    shutil.rmtree(run.parent.parent / "relative")


@pytest.mark.parametrize("out", ["/sys/foo", "/proc/foo", "file/x"])
def test_where_nothing_can_be_written(run, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["export", "--workdir", str(run), "--out", out]) == 2
    err = capsys.readouterr().err
    assert out in err and "can be made and written to" in err and "--out" in err


def test_dtype(run, tmp_path):
    main(["export", "--workdir", str(run), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"])
    import ml_dtypes

    assert {v.dtype for v in weights(tmp_path / "half").values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_exports_have_the_tokenizers_files_as_a_model_that_is_saved_has_them(run, shared, tmp_path):
    path = shared / "models" / "stories260k-llama"
    model, params = jaxalign.load(path)
    saved = jaxalign.save(tmp_path / "saved", model, params, source=path)
    main(["export", "--workdir", str(run), "--out", str(tmp_path / "out")])
    for name in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        for export in (saved, run / "sft" / "export", tmp_path / "out"):
            assert (export / name).read_bytes() == (path / name).read_bytes()


def test_a_run_whose_start_has_moved(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run / "sft", copy)
    written = json.loads((copy / "config.json").read_text())
    written["config"]["model"]["path"] = "/gone/away"
    (copy / "config.json").write_text(json.dumps(written))
    assert main(["export", "--workdir", str(copy), "--out", str(tmp_path / "out")]) == 0


def test_a_rerun_keeps_the_stage(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    config = json.loads((run / "sft" / "stage.json").read_text())["config"]
    c = defaults("sft")
    for section, value in config.items():
        if isinstance(value, dict):
            c[section].update({k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
        else:
            c[section] = value
    lines = []
    pipeline.run(stages(str(run), sft=c), log=lines.append)
    assert "done before" in lines[-1]  # behind a warning about its learning rate
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    copy, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copy)
    for file in (copy / "sft" / "checkpoints" / "3" / "state").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert main(["export", "--workdir", str(copy), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "checkpoint 3" in err and "damaged" in err and "--checkpoint 2" in err and not out.exists()
    assert main(["export", "--workdir", str(copy), "--out", str(out), "--checkpoint", "2"]) == 0


def test_numbers_that_are_not_finite_are_not_exported(run, tmp_path, capsys, monkeypatch):
    from jaxalign.pipeline import export

    read = export._restore

    def spoiled(state, *wanted):
        found = read(state, *wanted)
        return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), found) if "/3/" in str(state) else found

    monkeypatch.setattr(export, "_restore", spoiled)
    monkeypatch.setattr(checkpoints, "read_meta", lambda folder: {})  # as an earlier version left it
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "not finite" in err and "--checkpoint 2" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--stage", "dpo"], "no stage 'dpo'"),
        (["--checkpoint", "9"], "last, best or one of 1, 2, 3"),
        (["--checkpoint", "first"], "checkpoint 'first'"),
    ],
)
def test_refusals(run, tmp_path, capsys, flags, words):
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "o"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_nothing_is_overwritten(run, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path)]) == 2
    assert "thesis.txt" in capsys.readouterr().err


def test_which_stage(tmp_path, capsys):
    for name, inputs in {
        "dpo": {"model": "sft"},
        "sft": {},
        "a": {"model": "sft", "reward": "dpo"},
        "sft.old-1": {},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"format": 99, "config": {}}')
        (tmp_path / name / "stage.json").write_text(json.dumps({"from": inputs}))
    assert main(["export", "--workdir", str(tmp_path), "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert "holds the stages sft, dpo, a" in error and "--stage a" in error
    (tmp_path / "a" / "stage.json").write_text("{")
    (tmp_path / "sft" / "stage.json").write_text('{"from": {"model": "dpo"}}')  # no run writes a circle
    assert main(["export", "--workdir", str(tmp_path), "--out", "o"]) == 2
    assert "holds the stages a, " in capsys.readouterr().err
    assert main(["export", "--workdir", str(tmp_path / "sft"), "--out", "o"]) == 2
    assert "run format 99" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["export", "--workdir", str(tmp_path / "empty"), "--out", "o"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_the_card_says_what_the_model_is_made_of(run, tmp_path):
    from huggingface_hub import ModelCard

    assert main(["export", "--workdir", str(run), "--checkpoint", "best", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert text == (run / "sft" / "export" / "README.md").read_text()  # the run's own export is of the best too
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and {"jaxalign", "sft"} <= set(card.data.tags)
    for words in ("stories260k-llama", "d.jsonl", "16 records trained on", "eval/loss", "learning_rate: 1.0", "jax "):
        assert words in text, words
    assert "the records of data.sources" in text  # with a digest
    assert "max_length: 32" in text
    given = json.loads((run / "sft" / "config.json").read_text())["config"]
    settled = given | {"data": given["data"] | {"max_length": 512}}  # what the model was made for: nobody asked for it
    assert "max_length" not in model_card(RunDir(str(run / "sft")), settled, 1)
    number = re.search(r"after (\d+) steps", text)[1]
    loss = next(
        row["eval/loss"]
        for row in map(json.loads, (run / "sft" / "metrics.jsonl").read_text().splitlines())
        if row["step"] == int(number) and "eval/loss" in row
    )
    assert f"| `eval/loss` | {loss:.4g} |" in text
    kept = tmp_path / "kept.yaml"
    kept.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    config = load_config(str(kept))
    assert config.optimizer.learning_rate == 1.0 and config.checkpoint.best_metric == "loss"


def test_a_card_that_somebody_wrote_is_not_replaced(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--workdir", str(run), "--out", str(out)]) == 0
    assert main(["export", "--workdir", str(run), "--out", str(out)]) == 0
    (out / "README.md").write_text("# Mine")
    assert main(["export", "--workdir", str(run), "--out", str(out)]) == 2
    assert "README.md" in capsys.readouterr().err and (out / "README.md").read_text() == "# Mine"


class Hub:
    """A hub that notes what it is given, or refuses."""

    def __init__(self, monkeypatch, token="t", error=None, private=True):
        import huggingface_hub
        from huggingface_hub import constants

        self.calls = []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)

        class Api:
            def __init__(api, token):
                self.calls.append(("token", token))

            def create_repo(api, repo, **options):
                self.calls.append(("create", repo, options))

            def repo_info(api, repo):
                return SimpleNamespace(private=private)

            def upload_folder(api, *, folder_path, repo_id, commit_message, delete_patterns):
                assert "*.safetensors.index.json" in delete_patterns and "*.safetensors" in delete_patterns
                if error is not None:
                    raise error
                self.calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)


def test_push(run, tmp_path, monkeypatch, capsys):
    hub = Hub(monkeypatch)
    assert main(["export", "--workdir", str(run), "--push", "me/model"]) == 0
    assert capsys.readouterr().out == "me/model\n"
    assert ("token", "t") in hub.calls and ("create", "me/model", {"private": True, "exist_ok": True}) in hub.calls
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub.calls[-1][2])


@pytest.mark.parametrize("private", [True, False])
def test_a_push_where_all_can_read_the_card_warns(run, monkeypatch, capsys, private):
    hub = Hub(monkeypatch, private=private)
    assert main(["export", "--workdir", str(run), "--push", "me/model"]) == 0
    said = capsys.readouterr().err
    assert ("me/model is public" in said) is not private
    assert hub.calls[-1][0] == "upload"


@pytest.mark.parametrize(
    "push, token, error, words",
    [
        ("me", "t", None, "owner/name"),
        ("me/a b", "t", None, "owner/name"),
        ("me/model", None, None, "HF_TOKEN"),
        ("me/model", "t", ConnectionError("no route"), "no route"),
    ],
)
def test_push_refuses_in_words(run, tmp_path, monkeypatch, capsys, push, token, error, words):
    Hub(monkeypatch, token, error)
    out = tmp_path / "out"
    assert main(["export", "--workdir", str(run), "--out", str(out), "--push", push]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert out.exists() == (error is not None)  # before the model is read, but for the network


def test_export_wants_a_place(run, capsys):
    assert main(["export", "--workdir", str(run)]) == 2
    assert "--out" in capsys.readouterr().err

"""What changed between a stop and a resume is told, and nothing is trained on."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from run_child import make_config, stories
from safetensors.numpy import load_file, save_file

from jaxalign.errors import InputError
from jaxalign.train import inputs, trainer
from jaxalign.train.checkpoints import read_meta

REWARD = """
def score(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def begun(shared, tmp_path_factory):
    """PPO stopped after a step: its folder with data, two models and a reward file beside the run."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "reward.py").write_text(REWARD)
    for name in ("start", "value"):
        shutil.copytree(shared / "models" / "stories260k-llama", folder / name)
    lines = [{"prompt": f"Once there were {i} dogs, and"} for i in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(folder, num_train_steps=1)
    return folder


def config_of(folder, **fields):
    fields = {
        "model.path": str(folder / "start"),
        "algorithm.value_path": str(folder / "value"),
        "rewards.function": f"{folder / 'reward.py'}:score",
        "data.sources": (str(folder / "data.jsonl"),),
        "data.cache_dir": None,
        "data.eval_fraction": 0.2,
        "data.max_records": None,
        "num_train_steps": 2,
    } | fields
    return make_config(stories(Path("absent"), folder / "run", "ppo", **fields))


def run(folder, **fields):
    return trainer.run(config_of(folder, **fields), devices=jax.devices()[:1])


def edited(name, change):
    def edit(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return edit


def other_weights(name):
    def edit(folder):
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        save_file({k: np.ascontiguousarray(v * 1.001) for k, v in tensors.items()}, path, {"format": "pt"})

    return edit


CHANGES = {
    "the records of data.sources": edited("data.jsonl", lambda text: text.replace(" 3 dogs", " 3 cats")),
    "the weights of model.path": other_weights("start"),
    "the weights of algorithm.value_path": other_weights("value"),
    "the config.json of model.path": edited("start/config.json", lambda text: text.replace("10000.0", "20000.0")),
    "the file of rewards.function": edited("reward.py", lambda text: text.replace("len(c)", "-len(c)")),
    "the chat template": edited(
        "start/tokenizer_config.json", lambda text: text.replace("{", '{"chat_template": "x",', 1)
    ),
}


def moved(begun, folder):
    """A copy stands where the run was begun, as far as its configuration goes."""
    edited("run/config.json", lambda text: text.replace(str(begun), str(folder)))(folder)


def own_files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_input_is_told_before_anything_is_computed(what, begun, tmp_path, monkeypatch):
    for name in ("start", "value", "run"):
        shutil.copytree(begun / name, tmp_path / name)
    for name in ("data.jsonl", "reward.py"):
        shutil.copy(begun / name, tmp_path / name)
    CHANGES[what](tmp_path)
    monkeypatch.setattr(trainer.Stage, "frozen", None)  # nothing is trained
    moved(begun, tmp_path)
    before = own_files(tmp_path / "run")
    with pytest.raises(InputError) as error:
        run(tmp_path)
    assert what in error.value.found and "," not in error.value.found.partition("a change in")[2]
    assert "put it back" in error.value.fix and "workdir=ANOTHER" in error.value.fix
    assert before == own_files(tmp_path / "run")


def test_a_reward_that_was_mended_is_taken_where_that_is_asked_for(begun, tmp_path, capsys):
    for name in ("start", "value", "run"):
        shutil.copytree(begun / name, tmp_path / name)
    for name in ("data.jsonl", "reward.py"):
        shutil.copy(begun / name, tmp_path / name)
    CHANGES["the file of rewards.function"](tmp_path)
    moved(begun, tmp_path)
    with pytest.raises(InputError, match=r"checkpoint\.resume=reward"):
        run(tmp_path)
    assert run(tmp_path, **{"checkpoint.resume": "reward"})["steps"] == 2
    assert "from step 1 on there is another reward" in capsys.readouterr().err
    meta = read_meta(epath.Path(tmp_path / "run" / "checkpoints" / "2"))
    assert meta["changes"] == [{"step": 1, "changed": "the file of rewards.function"}]
    CHANGES["the records of data.sources"](tmp_path)
    with pytest.raises(InputError, match=r"the records of data\.sources") as error:
        run(tmp_path, num_train_steps=3, **{"checkpoint.resume": "reward"})
    assert "resume=reward" not in error.value.fix


def test_eval_sources_in_place_of_a_share_move_held_out_records_into_training(begun, monkeypatch):
    monkeypatch.setattr(trainer.Stage, "frozen", None)
    with pytest.raises(InputError, match="held out") as error:
        run(begun, **{"data.eval_sources": (str(begun / "data.jsonl"),)})
    assert "data.eval_sources" in error.value.found


def test_other_records_to_evaluate_on_are_told(shared, tmp_path, capsys):
    lines = [json.dumps({"prompt": f"Once there were {i} dogs", "completion": ", and"}) + "\n" for i in range(24)]
    for name, part in (("data", lines[:16]), ("held", lines[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))

    def go(steps):
        paths = {
            f"data.{n}": (str(tmp_path / f"{f}.jsonl"),) for n, f in (("sources", "data"), ("eval_sources", "held"))
        }
        fields = paths | {"num_train_steps": steps, "optimizer.schedule": "constant"}
        trainer.run(make_config(stories(shared, tmp_path / "run", "sft", **fields)), devices=jax.devices()[:1])
        return "data.eval_sources" in capsys.readouterr().err

    assert not go(1)
    (tmp_path / "held.jsonl").write_text("".join(lines[:8]))
    assert go(2)
    assert not go(3)


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(begun, tmp_path, capsys, monkeypatch):
    from jaxalign.train.checkpoints import Checkpoints

    shutil.copytree(begun / "run", tmp_path / "run")
    resume = Checkpoints.resume

    def old(self, like, **options):
        step, state, meta = resume(self, like, **options)
        return step, state, {name: value for name, value in meta.items() if name != "inputs"}

    monkeypatch.setattr(Checkpoints, "resume", old)
    config = config_of(begun)
    config.workdir = str(tmp_path / "run")
    assert trainer.run(config, devices=jax.devices()[:1])["steps"] == 2
    assert "does not say what it was made of" in capsys.readouterr().err


def test_what_follows_from_a_change_is_not_told():
    names = ["the chat template", "the tokens of the training records"]
    assert inputs.changed(dict.fromkeys(names, "a"), dict.fromkeys(names, "b")) == names[:1]
    assert inputs.changed({"gone": "a"}, {"new": "b"}) == []

"""Stages with a trainer that only notes what it is asked for."""

import json
import sys
import types
from pathlib import Path

import pytest

from jaxalign.config import defaults, stages, to_dict
from jaxalign.errors import InputError
from jaxalign.pipeline import stages as module
from jaxalign.train.models import fit_length
from jaxalign.train.rundir import RunDir


@pytest.fixture
def trainer(monkeypatch):
    """Calls of the trainer, by stage; `stop` names a stage that ends before it is done."""
    calls = types.SimpleNamespace(names=[], configs=[], dry=[], stop=None, fail=None, result={"loss": 1.0})

    def run(checked, dry_run=False):
        config, workdir = checked.config, Path(checked.config.workdir)
        calls.names.append(workdir.name)
        calls.configs.append(config)
        calls.dry.append(dry_run)
        if dry_run:
            return {"dry": True, "warnings": [f"of {workdir.name}"]}
        if calls.fail == workdir.name:
            raise RuntimeError("a crash")
        (workdir / "export").mkdir(parents=True, exist_ok=True)
        (workdir / "export" / "weights").write_text(str(config.optimizer.learning_rate))
        if calls.stop != workdir.name:
            (workdir / "DONE").write_text('{"steps": 1}')
            (workdir / "export").mkdir(exist_ok=True)
            (workdir / "export" / "model.safetensors").write_text("")
        return calls.result

    fake = types.ModuleType("jaxalign.train.trainer")
    fake.run = run
    import jaxalign.train

    monkeypatch.setitem(sys.modules, "jaxalign.train.trainer", fake)
    monkeypatch.setattr(jaxalign.train, "trainer", fake, raising=False)
    return calls


def section(algorithm, data, **fields):
    c = defaults(algorithm)
    c.data.sources = (str(data),)
    for key, value in fields.items():
        c["from"][key] = value
    return c


@pytest.fixture
def road(tmp_path):
    """SFT -> reward model -> PPO and SFT -> DPO."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a"}\n')

    def make(**changes):
        sft = section("sft", data)
        sft.model.path = "org/model"
        c = stages(
            str(tmp_path / "run"),
            sft=sft,
            dpo=section("dpo", data, model="sft"),
            reward=section("reward", data, model="sft"),
            ppo=section("ppo", data, model="sft", reward="reward"),
        )
        for field, value in changes.items():
            *parents, leaf = field.split("__")
            node = c
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return c

    return make


@pytest.fixture
def single(tmp_path):
    """A configuration without stages."""
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    c = section("sft", data)
    c.model.path, c.workdir = "org/model", str(tmp_path / "one")
    return c


def test_stages_run_in_order_on_each_others_results(road, trainer, tmp_path):
    results = module.run(road(), log=lambda line: None)
    assert trainer.names == ["sft", "dpo", "reward", "ppo"]
    run = tmp_path / "run"
    sft, dpo, reward, ppo = trainer.configs
    assert sft.model.path == "org/model"
    assert dpo.model.path == reward.model.path == ppo.model.path == str(run / "sft" / "export")
    assert ppo.rewards.model == str(run / "reward" / "export")
    assert results == {name: {"loss": 1.0} for name in trainer.names}
    record = json.loads((run / "ppo" / "stage.json").read_text())
    assert record["from"] == {"model": "sft", "reward": "reward"}
    assert record["format"] == 1


def test_a_rerun_does_nothing(road, trainer):
    module.run(road(), log=lambda line: None)
    lines = []
    results = module.run(road(), log=lines.append)
    assert len(trainer.names) == 4
    assert all(r["skipped"] for r in results.values())
    assert all("done before" in line for line in lines)


def test_a_rerun_starts_where_it_stopped(road, trainer, tmp_path):
    trainer.fail = "reward"
    with pytest.raises(RuntimeError):
        module.run(road(), log=lambda line: None)
    trainer.fail = None
    (tmp_path / "run" / "reward" / "checkpoints").mkdir(parents=True)
    module.run(road(), log=lambda line: None)
    assert trainer.names == ["sft", "dpo", "reward", "reward", "ppo"]
    assert (tmp_path / "run" / "reward" / "checkpoints").is_dir()  # resumed in place, not moved aside
    assert not list((tmp_path / "run").glob("*.old-*"))


def test_a_stage_that_was_stopped_ends_the_run(road, trainer):
    trainer.stop = "dpo"  # as after SIGTERM: saved, not done
    lines = []
    module.run(road(), log=lines.append)
    assert trainer.names == ["sft", "dpo"]
    assert "dpo stopped before its end" in lines[-1]
    assert sum("done" in line for line in lines) == 1


def test_a_changed_reward_stage_reruns_itself_and_what_depends_on_it(road, trainer, tmp_path):
    module.run(road(), log=lambda line: None)
    changed = road(reward__optimizer__learning_rate=3e-5)
    module.run(changed, log=lambda line: None)
    assert trainer.names[4:] == ["reward", "ppo"]
    run = tmp_path / "run"
    assert (run / "reward.old-1" / "export" / "weights").read_text() == "1e-05"
    assert (run / "reward" / "export" / "weights").read_text() == "3e-05"
    assert (run / "ppo.old-1" / "DONE").exists()
    assert not (run / "sft.old-1").exists() and not (run / "dpo.old-1").exists()
    module.run(road(), log=lambda line: None)  # and back again: nothing is ever overwritten
    assert trainer.names[6:] == ["reward", "ppo"]
    assert (run / "reward.old-2" / "export" / "weights").read_text() == "3e-05"


def test_a_longer_stage_goes_on_where_its_past_stays_what_it_was(road, trainer, tmp_path):
    constant = {"dpo__optimizer__schedule": "constant", "dpo__optimizer__warmup_steps": 2}
    module.run(road(**constant, dpo__num_train_steps=4), log=lambda line: None)
    dpo = tmp_path / "run" / "dpo"
    (dpo / "checkpoints" / "4").mkdir(parents=True)
    lines = []
    module.run(road(**constant, dpo__num_train_steps=6), log=lines.append)
    assert trainer.names[4:] == ["dpo"] and not list((tmp_path / "run").glob("*.old-*"))
    assert any("dpo: resuming to another length" in line for line in lines)
    module.run(road(**constant, dpo__num_train_steps=6), log=lambda line: None)
    assert len(trainer.names) == 5  # done at that length
    # a shorter one, another rate, a schedule that depends on the length, no checkpoint: anew, the earlier one kept
    module.run(road(**constant, dpo__num_train_steps=5), log=lambda line: None)
    assert trainer.names[5:] == ["dpo"] and (tmp_path / "run" / "dpo.old-1" / "checkpoints" / "4").is_dir()
    module.run(road(**constant, dpo__num_train_steps=7), log=lambda line: None)
    assert (tmp_path / "run" / "dpo.old-2").exists()
    (dpo / "checkpoints" / "7").mkdir(parents=True)
    module.run(road(**constant, dpo__num_train_steps=9, dpo__algorithm__beta=0.2), log=lambda line: None)
    assert (tmp_path / "run" / "dpo.old-3").exists()
    (dpo / "checkpoints" / "9").mkdir(parents=True)
    module.run(road(dpo__num_train_steps=11), log=lambda line: None)
    assert (tmp_path / "run" / "dpo.old-4").exists()


def test_what_depends_on_a_longer_stage_is_made_again(road, trainer, tmp_path):
    constant = {"sft__optimizer__schedule": "constant"}
    module.run(road(**constant), log=lambda line: None)
    (tmp_path / "run" / "sft" / "checkpoints" / "1").mkdir(parents=True)
    module.run(road(**constant, sft__num_epochs=2), log=lambda line: None)
    assert trainer.names[4:] == ["sft", "dpo", "reward", "ppo"]
    assert not (tmp_path / "run" / "sft.old-1").exists() and (tmp_path / "run" / "dpo.old-1").exists()


def test_what_a_stage_cannot_use_names_the_stages_own_flags(road, trainer, monkeypatch):
    def refuse(config, dry_run=False):
        raise InputError("x", "y", "--config.checkpoint.resume=whole; or --config.workdir=ANOTHER")

    monkeypatch.setattr(sys.modules["jaxalign.train.trainer"], "run", refuse)
    with pytest.raises(InputError, match="stage sft: x") as error:
        module.run(road(), log=lambda line: None)
    assert error.value.fix == "--config.sft.checkpoint.resume=whole; or --config.workdir=ANOTHER"


def test_changed_data_is_a_changed_input(road, trainer, tmp_path):
    module.run(road(), log=lambda line: None)
    (tmp_path / "data.jsonl").write_text('{"prompt": "b"}\n')  # same size: content counts
    module.run(road(), log=lambda line: None)
    assert trainer.names[4:] == ["sft", "dpo", "reward", "ppo"]


def test_what_does_not_change_the_result_does_not_rerun_it(road, trainer):
    module.run(road(), log=lambda line: None)
    module.run(
        road(sft__logging__every=50, sft__mesh__data=2, dpo__model__remat="none", ppo__checkpoint__every=7),
        log=lambda line: None,
    )
    assert len(trainer.names) == 4


def test_the_seed_is_shared_and_part_of_the_key(road, trainer):
    module.run(road(), log=lambda line: None)
    module.run(road(seed=5), log=lambda line: None)
    assert trainer.names[4:] == ["sft", "dpo", "reward", "ppo"]
    assert {c.seed for c in trainer.configs[4:]} == {5}


def test_a_moved_workdir_keeps_its_keys(road, trainer, tmp_path):
    module.run(road(), log=lambda line: None)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    module.run(road(workdir=str(tmp_path / "elsewhere")), log=lambda line: None)
    assert len(trainer.names) == 4


def test_a_directory_of_unknown_origin_is_kept(road, trainer, tmp_path):
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "thesis.txt").write_text("mine")
    module.run(road(), log=lambda line: None)
    assert (tmp_path / "run" / "sft.old-1" / "thesis.txt").read_text() == "mine"


def test_what_a_dry_run_cached_is_used_in_place(road, trainer, tmp_path):
    (tmp_path / "run" / "sft" / "cache").mkdir(parents=True)
    module.run(road(), log=lambda line: None)
    assert (tmp_path / "run" / "sft" / "cache").is_dir()
    assert not list((tmp_path / "run").glob("*.old-*"))


def test_a_stage_that_failed_before_its_first_step_is_begun_anew_in_place(road, trainer, tmp_path):
    trainer.fail = "sft"
    with pytest.raises(RuntimeError):
        module.run(road(), log=lambda line: None)
    (tmp_path / "run" / "sft" / "config.json").write_text("{}")
    (tmp_path / "run" / "sft" / "data_report.json").write_text("{}")
    trainer.fail = None
    lines = []
    module.run(road(sft__optimizer__learning_rate=1e-4), log=lines.append)
    assert not list((tmp_path / "run").glob("*.old-*"))
    assert lines[0].startswith("stage sft: runs")
    assert json.loads((tmp_path / "run" / "sft" / "stage.json").read_text())["config"]["optimizer"][
        "learning_rate"
    ] == pytest.approx(1e-4)


@pytest.mark.parametrize("workdir", ["/sys/foo", "/proc/foo", "data.jsonl/x"])
def test_a_workdir_that_cannot_be_is_input(road, trainer, tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="can be made and written to"):
        module.run(road(workdir=workdir), log=lambda line: None)
    assert trainer.names == []


@pytest.mark.parametrize(
    "result,line",
    [
        (
            {"metrics": {"loss": 2.0, "rewards/accuracies": 0.75, "x": 1.0}, "eval": {"eval/loss": 2.5}},
            "done, loss 2, eval/loss 2.5, rewards/accuracies 0.75 -> out",
        ),
        (
            {"metrics": {"loss/policy": 0.1, "objective/scores": 3.0, "objective/kl": 0.5}, "eval": {}},
            "done, objective/scores 3, objective/kl 0.5 -> out",
        ),
    ],
)
def test_the_last_line_shows_what_came_of_it(single, trainer, result, line):
    lines, trainer.result = [], {**result, "export": "out"}
    module.run(single, log=lines.append)
    assert lines == [line]


def test_part_of_the_stages(road, trainer):
    module.run(road(stages=("sft", "dpo")), log=lambda line: None)
    assert trainer.names == ["sft", "dpo"]
    module.run(road(), log=lambda line: None)
    assert trainer.names[2:] == ["reward", "ppo"]


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"ppo__from__model": "stf"}, "from.model is 'stf'"),
        ({"stages": ("dpo", "sft")}, "'sft', which runs after it"),
        ({"sft__from__model": "dpo"}, "'dpo', which runs after it"),
        ({"sft__from__model": "sft"}, "'sft' itself"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": ("sft", "bogus")}, "'bogus', which has no section"),
        ({"stages": ("sft", "sft")}, "'sft' twice"),
        ({"ppo__from__reward": "dpo"}, "a dpo stage"),
        ({"ppo__from__model": "reward"}, "a reward stage"),
        ({"dpo__from__reward": "reward", "stages": ("sft", "reward", "dpo")}, "dpo takes none"),
        ({"dpo__model__path": "org/other"}, "both from.model and model.path"),
        ({"dpo__model__from_scratch": True}, "from_scratch with from.model"),
        ({"ppo__from__reward": None}, "stage ppo: PPO without a reward"),
        ({"ppo__algorithm__clip_range": -1.0}, "stage ppo: algorithm.clip_range"),
        ({"ppo__data__sources": ("gone.jsonl",)}, "stage ppo: "),
        ({"ppo__data__sources": ("gone.jsonl",)}, "gone.jsonl"),
        ({"ppo__from__reward": None, "ppo__rewards__function": "nowhere.py:f"}, "stage ppo: no file 'nowhere.py'"),
        ({"sft__model__path": None}, "stage sft: model.path is not set"),
        ({"workdir": None}, "workdir is not set"),
        ({"workdir": " "}, "workdir is not set"),
    ],
)
def test_every_stage_is_checked_before_the_first_runs(road, trainer, changes, words):
    with pytest.raises(InputError) as error:
        module.run(road(**changes), log=lambda line: None)
    assert words in str(error.value)
    assert trainer.names == []


def test_the_fix_names_the_stages_own_flag(road, trainer):
    with pytest.raises(InputError) as error:
        module.run(road(ppo__algorithm__clip_range=-1.0), log=lambda line: None)
    assert error.value.fix.startswith("--config.ppo.algorithm.clip_range=")


def test_dry_run_stands_for_what_is_not_trained_yet(road, trainer, tmp_path):
    module.run(road(), dry_run=True, log=lambda line: None)
    assert trainer.names == ["sft", "dpo", "reward", "ppo"]
    assert all(trainer.dry)
    assert {c.model.path for c in trainer.configs} == {"org/model"}
    assert trainer.configs[3].rewards.model == "org/model"
    assert not (tmp_path / "run").exists()


def test_the_warnings_of_all_stages_end_a_dry_run(road, trainer):
    lines = []
    module.run(road(), dry_run=True, log=lines.append)
    assert lines[-4:] == [f"warning: {name}: of {name}" for name in trainer.names]


def test_a_changed_stage_among_several_is_dry_run_and_a_changed_run_alone_is_refused(
    road, single, trainer, shared, tmp_path
):
    module.run(road(), log=lambda line: None)
    module.run(road(sft__optimizer__learning_rate=3e-5), dry_run=True, log=lambda line: None)  # it would be run anew
    assert trainer.names[4:] == trainer.names[:4] and all(trainer.dry[4:])
    assert not list((tmp_path / "run").glob("*.old-*"))

    single.model.path = str(shared / "models" / "stories260k-llama")
    directory = RunDir(single.workdir)
    directory.open(to_dict(fit_length(single)[0]), resume=True)
    directory.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    module.run(single, dry_run=True, log=lambda line: None)
    assert trainer.names[8:] == ["one"]
    single.optimizer.learning_rate = 3e-5
    with pytest.raises(InputError, match="another configuration"):
        module.run(single, dry_run=True, log=lambda line: None)
    assert len(trainer.names) == 9


def test_warnings_name_their_stage(road, trainer):
    lines = []
    module.run(road(dpo__algorithm__beta=3.0), log=lines.append)
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: dpo: algorithm.beta is 3; guides for dpo give 0.05 to 0.5"
    ]


def test_a_seed_of_a_stages_own_is_told_to_be_without_effect(road):
    planned = module.plan(road(seed=7, sft__seed=7, dpo__seed=5))
    assert [s.name for s in planned if "its own seed" in str(s.checked.warnings)] == ["dpo"]


def test_a_single_stage_is_the_trainers_own(single, trainer, tmp_path):
    assert module.run(single, log=lambda line: None) == {"loss": 1.0}
    assert not (tmp_path / "one" / "stage.json").exists()


def test_a_second_run_of_the_stages_is_refused_and_nothing_is_moved(road, trainer, tmp_path):
    from jaxalign.train.lock import exclusive

    module.run(road(), log=lambda line: None)
    changed = road(sft__optimizer__learning_rate=3e-5)
    for held in ("run", "run/sft"):  # another run of the stages, and of one of them
        with exclusive(tmp_path / held):
            for dry_run in (True, False) if held == "run" else (False,):
                with pytest.raises(InputError, match="is in use"):
                    module.run(changed, dry_run=dry_run, log=lambda line: None)
    assert len(trainer.names) == 4 and not list((tmp_path / "run").glob("*.old-*"))
    module.run(changed, log=lambda line: None)
    aside = tmp_path / "run" / "sft.old-1"
    assert len(trainer.names) == 8 and aside.is_dir()
    assert not list((tmp_path / "run").rglob(".lock"))


def test_from_without_stages_is_refused(tmp_path):
    c = section("dpo", tmp_path / "d.jsonl", model="sft")
    c.workdir, c.model.path = "w", "m"
    with pytest.raises(InputError, match=r"from\.model is 'sft' in a configuration without stages"):
        module.plan(c)


@pytest.mark.parametrize("seed", [-1, 1 << 40, None, True])
def test_the_shared_seed_is_checked_as_such(road, seed):
    config = road()
    with config.ignore_type():
        config.seed = seed
    with pytest.raises(InputError, match=r"^found:    seed is") as error:
        module.plan(config)
    assert error.value.fix == "--config.seed=0"


def test_stages_without_sections():
    from ml_collections import ConfigDict

    for names in ((), ("sft",), None):
        with pytest.raises(InputError):
            module.plan(ConfigDict({"stages": names, "seed": 0, "workdir": "w"}))


def test_float64_of_a_later_stage_is_refused_before_the_first_one_runs(road, trainer):
    config = road()
    config.dpo.model.dtype = "float64"
    with pytest.raises(InputError, match=r"stage dpo: model\.dtype is float64"):
        module.run(config, log=lambda line: None)
    assert trainer.names == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00"])
def test_a_damaged_record_of_a_stage_is_refused_with_advice_that_works(road, trainer, tmp_path, text):
    module.run(road(), log=lambda line: None)
    record = tmp_path / "run" / "dpo" / "stage.json"
    record.write_text(text)
    with pytest.raises(InputError, match=r"stage\.json is damaged") as error:
        module.run(road(), log=lambda line: None)
    assert f"rm {record}" in error.value.fix and len(trainer.names) == 4
    record.unlink()
    module.run(road(), log=lambda line: None)
    assert trainer.names[4:] == ["dpo"] and (tmp_path / "run" / "dpo.old-1").is_dir()


def test_a_stage_whose_end_is_damaged_is_not_skipped(road, trainer, tmp_path):
    module.run(road(), log=lambda line: None)
    (tmp_path / "run" / "dpo" / "DONE").write_text("{}")
    module.run(road(), log=lambda line: None)
    assert trainer.names[4:] == ["dpo"] and not (tmp_path / "run" / "dpo.old-1").exists()

"""Training by an algorithm's name, the list of fields, and config files of YAML and JSON."""

import json
import shlex

import pytest

from jaxalign.cli import main
from jaxalign.config import defaults, get, leaves
from jaxalign.data.source import Source
from jaxalign.pipeline.configfile import load_config
from jaxalign.pipeline.configtext import FORMS, as_python, written
from jaxalign.pipeline.fields import fields
from jaxalign.registry import ALGORITHMS


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    return str(file)


def failed(capsys, *argv):
    """What a refused command says."""
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "fix: " in err
    return err


def test_a_name_a_model_and_data_are_enough(trainer, data, capsys, tmp_path):
    assert main(["train", "dpo", "--model", "org/m", "--data", data]) == 0
    ((config, dry),) = trainer
    assert (config.algorithm.name, config.model.path, tuple(config.data.sources)) == ("dpo", "org/m", (data,))
    assert config.workdir == "runs/dpo" and not dry
    printed = capsys.readouterr().out
    kept = tmp_path / "kept.py"
    kept.write_text(printed[: printed.index("return config") + len("return config")] + "\n")
    assert load_config(str(kept)) == config


def test_the_name_of_a_loss_leads_to_dpo(capsys):
    assert main(["train", "simpo", "--model", "m"]) == 2
    fix = "fix:      jaxalign train dpo --model DIR --data FILE --loss=simpo --reference=none"
    assert fix in capsys.readouterr().err


def test_flags_of_an_algorithm_without_its_name(data, capsys):
    said = failed(capsys, "train", "--model", "m", "--data", data)
    assert "no algorithm" in said and f"jaxalign train dpo --model m --data {data}" in said


@pytest.mark.parametrize(
    "flags, field, value",
    [
        (["--out", "o"], "workdir", "o"),
        (["--beta=0.3"], "algorithm.beta", 0.3),
        (["--algorithm.beta", "0.3"], "algorithm.beta", 0.3),
        (["--config.algorithm.beta=0.3"], "algorithm.beta", 0.3),
        (["--learning_rate=2e-6"], "optimizer.learning_rate", 2e-6),
        (["--max-length=64"], "data.max_length", 64),
        (["--packing"], "data.packing", True),
        (["--eval_data=e.jsonl"], "data.eval_sources", ("e.jsonl",)),
        (["--num_train_steps=5"], "num_train_steps", 5),
    ],
)
def test_fields_by_flags(trainer, data, flags, field, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert main(["train", "dpo", "--model=m", f"--data={data}", *flags]) == 0
    assert get(trainer[0][0], field) == value


def test_dry_run_and_several_files(trainer, data):
    assert main(["train", "dpo", "--model=m", "--data", data, "--data", data, "--dry_run"]) == 0
    config, dry = trainer[0]
    assert tuple(config.data.sources) == (data, data) and dry


def test_a_reward_is_a_model_or_a_function(trainer, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text("def reward(prompts, completions): return [0.0 for _ in prompts]\n")
    for given, model, function in (("r.py:reward", None, "r.py:reward"), ("org/rm", "org/rm", None)):
        assert main(["train", "ppo", "--model=m", f"--data={data}", f"--reward={given}"]) == 0
        config, _ = trainer.pop()
        assert (config.rewards.model, config.rewards.function) == (model, function)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["dpo"], "jaxalign train dpo --model DIR --data pairs.jsonl"),
        (["dpo", "--model=m"], "no --data"),
        (["dpo", "--data=d"], "no --model"),
        (["ppo", "--model=m", "--data=d"], "--reward"),
        (["sft", "--model=m", "--data=d", "--reward=r"], "ppo alone"),
        (["dpoo", "--model=m", "--data=d"], "train dpo"),
        (["dpo", "--config=c.py"], "both dpo and --config"),
        (["--config=configs/dpo.py", "dpo"], "beside --config"),
        (["dpo", "--model=m", "--data=d", "--betta=1"], "--algorithm.beta=1"),
        (["dpo", "--model=m", "--data=d", "--lr=1e-6"], "--optimizer.learning_rate=1e-6"),
        (["dpo", "--model=m", "--data=d", "--every=3"], "--eval.every"),
        (["dpo", "--model=m", "--data=d", "--modle=x"], "--model"),
        (["sft", "--model=m", "--data=d", "--optimizer=schedule_free"], "fix:      --optimizer.name=schedule_free"),
        (["sft", "--model=m", "--data=d", "--optimizer=lyon"], "fix:      --optimizer.name=lion"),
        (["dpo", "--model=m", "--data=d", "--algorithm=ipo"], "fix:      --algorithm.loss=ipo"),
        (["sft", "--model=m", "--data=d", "--name=schedule_free"], "fix:      --optimizer.name=schedule_free"),
        (["dpo", "--model=m", "--data=d", "--beta=-1"], "--algorithm.beta=0.1"),
        (["dpo", "--model=", "--data=d"], "--model is ''"),
        (["dpo", "m", "d"], "argument 'm'"),
    ],
)
def test_wrong_input_is_told_in_words(trainer, capsys, argv, words):
    assert words in failed(capsys, "train", *argv)
    assert trainer == []


def fixed(capsys, *argv):
    """The flag that a refused command proposes, as a shell reads it: (its name, its value)."""
    (word,) = shlex.split(failed(capsys, *argv).partition("fix:      ")[2])
    name, _, value = word.partition("=")
    return name, json.loads(value)


def test_columns_by_a_flag_of_their_own_are_put_beside_the_path(trainer, capsys, tmp_path):
    flags = ["--columns.prompt=question", "--data", "qa.jsonl", "--columns.completion", "answer"]
    columns = {"prompt": "question", "completion": "answer"}
    expected = [{"path": "qa.jsonl", "columns": columns}]
    assert fixed(capsys, "train", "sft", "--model=m", *flags) == ("--data", expected)
    assert fixed(capsys, "train", "sft", "--model=m", "--data=qa.jsonl", f"--columns={columns}") == ("--data", expected)
    file = tmp_path / "c.yaml"
    file.write_text("algorithm: sft\nmodel: {path: m}\ndata: {sources: [qa.jsonl]}\n")
    flag, sources = fixed(capsys, "train", f"--config={file}", "--config.data.columns.prompt=question")
    assert flag == "--config.data.sources" and sources == [{"path": "qa.jsonl", "columns": {"prompt": "question"}}]
    assert trainer == []


@pytest.mark.parametrize(
    "source, right",
    [
        ({"weight": "2", "columns": {"prompt": "q"}}, {"weight": 2, "columns": {"prompt": "q"}}),
        ({"weight": "0.5"}, {"weight": 0.5}),
        ({"streaming": "true", "split": "train"}, {"streaming": True, "split": "train"}),
        ({"wieght": 2, "split": "train"}, {"weight": 2, "split": "train"}),
        ({"split": 1, "weight": 3}, {"weight": 3}),
        # the data's names first
        ({"columns": {"q": "prompt", "a": "completion"}}, {"columns": {"prompt": "q", "completion": "a"}}),
        ({"columns": {"q": "prompt", "completion": "a"}}, {"columns": {"prompt": "q", "completion": "a"}}),
    ],
)
def test_the_fix_of_a_source_is_the_whole_source_as_the_flag_that_was_used(capsys, tmp_path, shared, source, right):
    file = tmp_path / "it's 1 (one).jsonl"
    file.write_text(json.dumps({"q": "Once", "a": " there was"}) + "\n")
    model = str(shared / "models" / "stories260k-llama")
    data = json.dumps([{"path": str(file), **source}])
    flag, (fix,) = fixed(capsys, "train", "sft", "--model", model, "--data", data, f"--out={tmp_path / 'run'}")
    assert flag == "--data" and fix == {"path": str(file), **right}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_field_is_listed(algorithm, capsys):
    assert main(["config", algorithm]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} = " in out for name in leaves(defaults(algorithm)))
    assert max(map(len, out.splitlines())) <= 120


def test_the_keys_of_a_source_are_listed():
    told = next(field.sentence for field in fields("dpo") if field.name == "data.sources")
    assert all(key in told for key in Source._fields if key != "field")


def test_fields_have_the_sentences_of_their_own_algorithm():
    told = {name: {f.name: f for f in fields(name)} for name in ALGORITHMS}
    assert told["dpo"]["optimizer.max_grad_norm"].sentence.endswith("0: no clipping")
    assert "frozen copy" in told["dpo"]["algorithm.reference"].sentence
    assert "last turn" in told["sft"]["data.train_on"].sentence
    assert told["ppo"]["rollout.num_samples"].sentence != told["dpo"]["logging.num_samples"].sentence
    assert told["ppo"]["optimizer.value_learning_rate"].sentence != told["ppo"]["optimizer.learning_rate"].sentence
    assert "0.4999" in told["reward"]["algorithm.label_smoothing"].allowed


@pytest.mark.parametrize("form", FORMS)
def test_a_config_file_of_each_form_is_read_again(form, tmp_path, capsys):
    flags = ["--model", "org/m", "--data", "a.jsonl", "--learning_rate=2e-7", "--packing", "--mesh.fsdp=2"]
    assert main(["config", "dpo", f"--as={form}", *flags]) == 0
    file = tmp_path / f"c.{form}"
    file.write_text(capsys.readouterr().out)
    config = load_config(str(file))
    assert (config.optimizer.learning_rate, config.data.packing, config.mesh.fsdp) == (2e-7, True, 2)
    assert written(config, form) == file.read_text()


def test_config_alone_gives_a_file_to_fill_in(capsys):
    assert main(["config", "ppo", "--as", "py"]) == 0
    assert "DIR_OR_HUB_ID" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, fix", [(["dpoo"], "config dpo"), (["dpo", "--as=xml"], "--as=py"), (["dpo", "--beta=1"], "--beta=1 --as=py")]
)
def test_config_refuses_in_words(capsys, argv, fix):
    assert fix in failed(capsys, "config", *argv)


def test_yaml_and_json_take_what_people_write(tmp_path):
    text = """
algorithm: dpo
model: {path: org/m}
data:
  sources: a,b.jsonl      # one name, comma and all
  eval_sources: [e.jsonl, {path: f, weight: 2}]
optimizer.learning_rate: 1e-6
batch_size: 8
num_train_steps: null
"""
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(str(tmp_path / "c.yaml"), [("seed", "3")])
    assert config.optimizer.learning_rate == 1e-6 and config.seed == 3
    assert config.data.sources == ("a,b.jsonl",) and config.data.eval_sources[1]["weight"] == 2
    run = tmp_path / "config.json"  # as a run writes it
    from jaxalign.config import to_dict

    run.write_text(json.dumps({"format": 1, "config": to_dict(config)}))
    assert as_python(load_config(str(run))) == as_python(config)


def test_stages_in_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "workdir: w\nseed: 4\nstages: [sft, align]\nsft: {model: {path: m}, data: {sources: [a]}}\n"
        "align: {algorithm: {name: dpo, beta: 0.3}, from: {model: sft}, data: {sources: [b]}}\n"
    )
    config = load_config(str(tmp_path / "c.yaml"))
    assert config.stages == ("sft", "align") and config.align.algorithm.beta == 0.3 and config.seed == 4
    assert config.align["from"].model == "sft" and config.workdir == "w"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("c.yaml", "a: [", "YAML"),
        ("c.yaml", "- 1", "list"),
        ("c.yaml", "model: {path: m}", "names no algorithm"),
        ("c.json", "{", "JSON"),
        ("c.json", '{"algorithm": "dpoo"}', "'dpoo'"),
        ("c.yaml", "algorithm: dpo\nmodle: {path: m}", "model"),
        ("c.yaml", "algorithm: dpo\nbatch_size: many", "batch_size"),
        ("c.yaml", "stages: [sft]", "stages"),
    ],
)
def test_a_wrong_file_is_told_in_words(tmp_path, capsys, name, text, words):
    (tmp_path / name).write_text(text)
    assert words in failed(capsys, "train", f"--config={tmp_path / name}")

"""What other programs call a field, and what their values are here: the fix is a line that can be pasted."""

from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.config import defaults, get, stages
from jaxalign.errors import InputError
from jaxalign.pipeline.configfile import load_config, run_script
from jaxalign.pipeline.overrides import override

ALIASES = [
    ("dpo", "lr", "optimizer.learning_rate"),
    ("dpo", "data.path", "data.sources"),
    ("dpo", "algorithm.betta", "algorithm.beta"),
    ("sft", "optimizer.lr", "optimizer.learning_rate"),
    ("sft", "model.lr", "optimizer.learning_rate"),
    ("sft", "per_device_train_batch_size", "batch_size"),
    ("sft", "gradient_accumulation_steps", "grad_accum_steps"),
    ("sft", "num_train_epochs", "num_epochs"),
    ("sft", "max_steps", "num_train_steps"),
    ("sft", "model_name_or_path", "model.path"),
    ("sft", "output_dir", "workdir"),
    ("sft", "dataset_name", "data.sources"),
    ("dpo", "max_completion_length", "data.max_completion_length"),
    ("ppo", "max_completion_length", "rollout.max_new_tokens"),
    ("sft", "max_prompt_length", "data.max_prompt_length"),
    ("sft", "bf16", "model.dtype"),
    ("sft", "gradient_checkpointing", "model.remat"),
    ("sft", "logging_steps", "logging.every"),
    ("sft", "save_steps", "checkpoint.every"),
    ("sft", "eval_steps", "eval.every"),
    ("sft", "warmup_ratio", "optimizer.warmup_steps"),
    ("sft", "lr_scheduler_type", "optimizer.schedule"),
    ("ppo", "kl_penalty", "algorithm.kl_coef"),
    ("ppo", "cliprange", "algorithm.clip_range"),
    ("ppo", "ppo_epochs", "algorithm.num_ppo_epochs"),
    ("ppo", "rollout.max_tokens", "rollout.max_new_tokens"),
    ("sft", "data.maxlength", "data.max_length"),
    ("sft", "checkpoint.evry", "checkpoint.every"),
    ("sft", "eval.evry", "eval.every"),
]


@pytest.mark.parametrize("algorithm,name,near", ALIASES)
def test_what_others_call_a_field(algorithm, name, near):
    with pytest.raises(InputError) as error:
        override(defaults(algorithm), name, "1")
    assert error.value.fix.startswith(f"--config.{near}=")


LORA = [  # PEFT's, TRL's and bitsandbytes'
    ("lora_r", "8", "adapter.rank=8"),
    ("lora_alpha", "32", "adapter.alpha=32"),
    ("lora_target_modules", "q_proj,v_proj", "adapter.targets=q_proj,v_proj"),
    ("use_dora", "true", "adapter.dora=true"),
    ("use_peft", "true", "adapter.rank=16"),
    ("load_in_4bit", "true", "model.frozen_dtype=nf4"),
    ("load_in_8bit", "True", "model.frozen_dtype=int8"),
    ("bits", "4", "model.frozen_dtype=nf4"),
    ("gamma", "1.0", "algorithm.simpo_gamma=1"),
    ("bnb_4bit_compute_dtype", "bf16", "model.dtype=bfloat16"),
]


@pytest.mark.parametrize("name, value, fix", LORA)
def test_flags_of_adapters(name, value, fix, tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text("from jaxalign.config import defaults\n\n\ndef get_config():\n    return defaults('dpo')\n")
    given = f"--{name}" if value == "true" else f"--{name}={value}"
    for command, prefix in ((["dpo", "--model=m", "--data=d.jsonl"], ""), ([f"--config={file}"], "config.")):
        assert main(["train", *command, given]) != 0
        assert capsys.readouterr().err.rstrip().endswith(f"fix:      --{prefix}{fix}")


@pytest.mark.parametrize("name", ["lora_dropout", "adapter.dropout", "config.lora_dropout"])
def test_dropout_is_said_not_to_exist(name, tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text("from jaxalign.config import defaults\n\n\ndef get_config():\n    return defaults('dpo')\n")
    for command in (["dpo", "--model=m", "--data=d.jsonl"], [f"--config={file}"]):
        assert main(["train", *command, f"--{name}=0.1"]) != 0
        said = capsys.readouterr().err
        assert (
            "nothing is dropped out here" in said and "fix:      without --" in said and "smaller adapter.rank" in said
        )
    file.write_text(file.read_text().replace("    return", "    c =") + "    c.adapter.dropout = 0.1\n    return c\n")
    assert main(["train", f"--config={file}"]) != 0
    said = capsys.readouterr().err
    assert "nothing is dropped out here" in said and f"line 6 of {file}: without it" in said


@pytest.mark.parametrize("name", ["rpo_alpha", "loss_weights"])
def test_weights_of_losses_lead_to_extra_losses(name, capsys):
    assert main(["train", "dpo", "--model=m", "--data=d.jsonl", f"--{name}=1.0"]) != 0
    assert f"fix:      without --{name}; --algorithm.extra_losses=" in capsys.readouterr().err


def test_a_number_of_layers_is_told_as_a_pattern(capsys):
    assert main(["train", "sft", "--model=m", "--data=d.jsonl", "--trainable_layers=2"]) != 0
    assert "'layers[-2:]' are the last 2 layers" in capsys.readouterr().err


def test_several_values_behind_a_flag(capsys):
    """As argparse takes them elsewhere."""
    assert main(["train", "dpo", "--model=m", "--adapter.targets", "q_proj", "v_proj"]) != 0
    assert "fix:      --adapter.targets=q_proj,v_proj" in capsys.readouterr().err


def test_what_others_call_a_field_of_a_stage():
    config = stages("w", sft=defaults("sft"), dpo=defaults("dpo"))
    for name, near in [("dpo.lr", "dpo.optimizer.learning_rate"), ("dpo.algorithm.betta", "dpo.algorithm.beta")]:
        with pytest.raises(InputError) as error:
            override(config, name, "1")
        assert error.value.fix.startswith(f"--config.{near}=")


def test_every_alias_stands_for_a_field_and_is_none_itself():
    from jaxalign.config import ALGORITHMS, leaves
    from jaxalign.pipeline.aliases import ALIASES as there

    fields = {field for algorithm in ALGORITHMS for field in leaves(defaults(algorithm))}
    assert {field for meant in there.values() for field in meant} <= fields
    assert not there.keys() & fields


VALUES = [
    ("sft", "bf16", "True", "model.dtype", "bfloat16", ""),
    ("sft", "bf16", None, "model.dtype", "bfloat16", ""),
    ("sft", "fp16", "true", "model.dtype", "float16", ""),
    ("sft", "torch_dtype", "torch.bfloat16", "model.dtype", "bfloat16", ""),
    ("sft", "gradient_checkpointing", "True", "model.remat", "full", ""),
    ("sft", "num_train_epochs", "3.0", "num_epochs", "3", ""),
    ("sft", "optim", "adamw_torch", "optimizer.name", "adamw", ""),
    ("sft", "optim", "schedule_free_adamw", "optimizer.name", "schedule_free", ""),
    ("sft", "min_lr", "2e-6", "optimizer.final_fraction", "0.1", "share of optimizer.learning_rate"),
    ("sft", "warmup_ratio", "0.1", "optimizer.warmup_steps", "...", "counts steps: 0.1 x the run's steps"),
    ("sft", "per_device_train_batch_size", "4", "batch_size", "4", "global"),
    ("sft", "gradient_accumulation_steps", "8", "grad_accum_steps", "8", "does not multiply"),
    ("ppo", "mini_batch_size", "16", "algorithm.num_minibatches", "4", "batch_size (now 64) / 16"),
    ("dpo", "precompute_ref_log_probs", "True", "algorithm.reference", "cached", ""),
    ("dpo", "lr", "1e-5", "optimizer.learning_rate", "1e-5", ""),
    ("dpo", "dataset_name", "a b.jsonl", "data.sources", "'a b.jsonl'", ""),
    ("sft", "batchsize", "0", "batch_size", "...", ""),  # what no field may hold is not offered
    ("sft", "model.dtpe", "bfloat", "model.dtype", "bfloat16", ""),
]


@pytest.mark.parametrize("algorithm,name,text,field,value,note", VALUES)
def test_what_others_values_are_here(algorithm, name, text, field, value, note):
    with pytest.raises(InputError) as error:
        override(defaults(algorithm), name, text)
    assert error.value.fix == f"--config.{field}={value}" and note in error.value.expected
    if value != "...":
        override(defaults(algorithm), field, value.strip("'"))


def test_a_share_of_known_steps_is_told_in_steps():
    config = defaults("sft")
    config.num_train_steps = 200
    with pytest.raises(InputError) as error:
        override(config, "warmup_ratio", "0.1")
    assert error.value.fix == "--config.optimizer.warmup_steps=20"


@pytest.mark.parametrize(
    "arguments,fix",
    [
        (["--beta=0.2"], "--config.algorithm.beta=0.2"),
        (["--beta", "0.2"], "--config.algorithm.beta=0.2"),
        (["beta=0.2"], "--config.algorithm.beta=0.2"),
        (["--learning_rate=1e-6"], "--config.optimizer.learning_rate=1e-6"),
        (["--learning-rate=1e-6"], "--config.optimizer.learning_rate=1e-6"),
        (["-lr=1e-6"], "--config.optimizer.learning_rate=1e-6"),
        (["--max_steps=10"], "--config.num_train_steps=10"),
        (["--bf16"], "--config.model.dtype=bfloat16"),
        (["--seed=3"], "--config.seed=3"),
        (["--optimizer.learning_rate=1"], "--config.optimizer.learning_rate=1"),
        (["--model=DIR"], "--config.model.path=DIR"),
        (["--config.model=DIR"], "--config.model.path=DIR"),
        (["--dryrun"], "--dry_run"),
        (["--bogus=1"], "jaxalign train --help"),
        (["other.py"], "jaxalign train --config=other.py"),
    ],
)
def test_a_field_without_its_beginning(arguments, fix, tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        'from jaxalign.config import defaults\ndef get_config():\n    return defaults("dpo")\n'
    )
    assert main(["train", f"--config={tmp_path / 'c.py'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"fix:      {fix}\n" in error and arguments[0].partition("=")[0] in error


def test_a_field_of_the_files_own(tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        "from jaxalign.config import defaults\nfrom ml_collections import ConfigDict\ndef get_config():\n"
        '    c = defaults("sft")\n    c.unlock()\n    c.mine = ConfigDict({"number": 3})\n    return c\n'
    )
    assert main(["train", f"--config={tmp_path / 'c.py'}", "--config.mine.numbr=4"]) == 2
    assert "fix:      --config.mine.number=4\n" in capsys.readouterr().err


def test_a_script_takes_fields_alone(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert run_script("quickstart", ["--beta=1"], lambda overrides: None, "configs/quickstart.py") == 2
    assert "--config.dpo.algorithm.beta=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line,field,value",
    [
        ("c.batchsize = 8", "batch_size", 8),
        ("c.batchsize = 0", "batch_size", 64),
        ("c.bf16 = True", "model.dtype", "bfloat16"),
        ("c.lr = 1e-4", "optimizer.learning_rate", 1e-4),
        ('c["from"].modl = "sft"', "from.model", "sft"),
        ('c.data.path = "a.jsonl"', "data.sources", ("a.jsonl",)),
        ('c.data.sources = "a.jsonl"', "data.sources", ("a.jsonl",)),
        ("c.batch_size = 8.0", "batch_size", 8),
        ("c.data.packin = True", "data.packing", True),
        ('c.model.revison = "None"', "model.revision", None),
    ],
)
def test_the_line_of_a_file_can_be_pasted(line, field, value, tmp_path):
    path = tmp_path / "c.py"
    text = 'from jaxalign.config import defaults\ndef get_config():\n    c = defaults("dpo")\n    LINE\n    return c\n'
    path.write_text(text.replace("LINE", line))
    with pytest.raises(InputError) as error:
        load_config(str(path))
    place, fixed = error.value.fix.split(": ", 1)
    assert place == f"line 4 of {path}"
    path.write_text(text.replace("LINE", fixed))
    assert get(load_config(str(path)), field) == value


@pytest.mark.parametrize("names", ["5", "(5, None)", "('gone',)", "'sft'"])
def test_stages_that_are_none_spoil_no_message(names, tmp_path, capsys):
    (tmp_path / "c.py").write_text(
        '"""A note.\n\nfirst     bash make.sh\n"""\nfrom jaxalign.config import defaults, stages\n'
        'def get_config():\n    c = stages("w", sft=defaults("sft"))\n    c.unlock()\n'
        f'    c["stages"] = {names}\n    return c\n'
    )
    for flags in (["--lr=1"], ["--config.sft.bf16=1"], []):
        assert main(["train", f"--config={tmp_path / 'c.py'}", *flags]) == 2
        assert "fix: " in capsys.readouterr().err

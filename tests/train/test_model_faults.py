"""Models that a stage cannot use: told before the first step, by role."""

import jax
import pytest
from run_child import make_config, stories
from safetensors.numpy import load_file, save_file

from jaxalign.errors import InputError
from jaxalign.train import trainer
from tests.cli.cases import copied, make_reward, with_token

ROLES = {
    "sft": ("sft", "model.path"),
    "reward": ("reward", "model.path"),
    "dpo": ("dpo", "model.path"),
    "reference": ("dpo", "algorithm.reference_path"),
    "ppo": ("ppo", "model.path"),
    "value": ("ppo", "algorithm.value_path"),
    "rewards": ("ppo", "rewards.model"),
}


@pytest.fixture
def refusal(shared, tmp_path):
    """What a run says where one of its roles has a changed model."""

    def refusal(role, change, **fields):
        base, (algorithm, field) = shared / "models" / "stories260k-llama", ROLES[role]
        source = make_reward(base, tmp_path / "reward") if role == "rewards" else base
        bad = copied(source, tmp_path / "bad")
        change(bad)
        fields = {field: str(bad), "data.max_records": 8} | fields
        if role == "rewards":
            fields |= {"rewards.function": None}
        config = make_config(stories(shared, tmp_path / "run", algorithm, **fields))
        with pytest.raises(InputError) as error:
            trainer.run(config, devices=jax.devices()[:1])
        assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))
        return error.value, str(bad)

    return refusal


@pytest.mark.parametrize("role", ROLES)
def test_a_broken_config_is_told_and_not_the_tokenizer(refusal, role):
    error, bad = refusal(role, lambda bad: (bad / "config.json").write_text("[1]"))
    assert f"{bad}/config.json holds a list" in error.found and "tokenizer" not in error.found


@pytest.mark.parametrize("role", [role for role in ROLES if role not in ("reference", "value")])
def test_trap_a_token_without_a_vector_is_told_before_step_1(refusal, role):
    error, bad = refusal(role, with_token)
    assert "'<|extra|>' (512)" in error.found and bad in error.found


def test_a_tokenizer_from_elsewhere_is_held_against_the_model(refusal, shared):
    other = str(shared / "tokenizers" / "minimind-6400")
    error, _ = refusal("sft", lambda bad: None, **{"model.tokenizer": other})
    assert "of vocabulary 512" in error.found


def test_a_value_model_with_too_few_vectors_is_told(refusal, shared):
    big = shared / "models" / "stories3m-llama"
    error, bad = refusal("value", lambda bad: None, **{"model.path": str(big)})
    assert bad in error.found and "value_path" in error.fix


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_revision_of_a_directory_is_told(refusal, algorithm):
    error, bad = refusal(algorithm, lambda bad: None, **{"model.revision": "main"})
    assert bad in error.found and error.fix == "--config.model.revision=None"


def test_a_template_that_no_record_needs_is_read_before_the_first_step(refusal):
    error, _ = refusal("sft", lambda bad: None, **{"model.chat_template": "{% for m in messages %}"})
    assert "chat_template" in error.found


def test_trap_a_reward_model_without_its_head_is_refused(refusal):
    """A fresh head in its place would give noise for scores."""

    def headless(bad):
        tensors = load_file(bad / "model.safetensors")
        save_file({name: value for name, value in tensors.items() if name != "score.weight"}, bad / "model.safetensors")

    error, bad = refusal("rewards", headless)
    assert "score.weight" in error.found and bad in error.found


@pytest.mark.parametrize("role", ["sft", "reference", "value", "rewards"])
def test_a_dry_run_reads_the_headers_of_weights(shared, tmp_path, role):
    base, (algorithm, field) = shared / "models" / "stories260k-llama", ROLES[role]
    bad = copied(make_reward(base, tmp_path / "reward") if role == "rewards" else base, tmp_path / "bad")
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500_000])
    fields = {field: str(bad), "data.max_records": 8} | ({"rewards.function": None} if role == "rewards" else {})
    config = make_config(stories(shared, tmp_path / "run", algorithm, **fields))
    with pytest.raises(InputError, match="cut short"):
        trainer.run(config, dry_run=True, devices=jax.devices()[:1])

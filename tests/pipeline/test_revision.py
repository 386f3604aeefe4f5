"""`model.revision` goes with `model.path`, for every role and file that is read from there, and with nothing else."""

import json
import shutil

import jax
import pytest
from huggingface_hub import constants

from jaxalign.config import defaults, stages
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.pipeline import stages as pipeline
from jaxalign.pipeline.export import export
from jaxalign.train import trainer
from jaxalign.train.algorithms import check_tokens
from jaxalign.train.models import Roles, revision_of


@pytest.fixture
def hub(shared, tmp_path, monkeypatch):
    """A hub's cache, offline: org/tiny is a model at v1 and none at main; org/words is a tokenizer, at main alone."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    source = shared / "models" / "stories260k-llama"
    for name, revision in (("tiny", "v1"), ("tiny", "main"), ("words", "main")):
        commit = f"{name}-{revision}".encode().hex().ljust(40, "0")
        folder = cache / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            if revision == "v1" or (name == "words" and file.name.startswith("tokenizer")):
                shutil.copyfile(file, snapshot / file.name)
        if name == "words" or revision == "v1":
            (snapshot / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "of": revision}))
        if revision == "main" and name == "tiny":
            (snapshot / "config.json").write_text('{"model_type": "broken"}')
    return cache


def at_v1(algorithm, tmp_path):
    c = defaults(algorithm)
    c.workdir = str(tmp_path / "run")
    c.model.path, c.model.revision = "org/tiny", "v1"
    return c


def test_a_ppo_run_and_its_exports_are_of_that_revision(hub, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "The dog"}\n')
    (tmp_path / "mine.py").write_text("def reward(prompts, completions):\n    return [len(c) for c in completions]\n")
    c = at_v1("ppo", tmp_path)
    c.model.tokenizer, c.model.remat = "org/words", "none"
    c.data.sources, c.data.max_length = (str(tmp_path / "p.jsonl"),), 32
    c.batch_size, c.num_train_steps, c.rollout.max_new_tokens, c.algorithm.num_ppo_epochs = 2, 1, 4, 1
    c.rewards.function = f"{tmp_path / 'mine.py'}:reward"
    c.logging.trackers, c.logging.progress = (), False
    found = trainer.run(c, devices=jax.devices()[:1])  # the value model starts from the policy's
    read = lambda folder: json.loads((folder / "generation_config.json").read_text())["of"]  # noqa: E731
    assert found["model_bytes"].keys() == {"policy", "value", "ref"}
    assert read(tmp_path / "run" / "export") == "v1"
    shutil.rmtree(tmp_path / "run" / "export")  # as in a run that was stopped
    assert read(export(c.workdir, str(tmp_path / "out"))) == "v1"
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer("org/words").get_vocab()


def test_other_roles_have_it_where_they_are_of_the_same_path(hub, tmp_path):
    c = at_v1("dpo", tmp_path)
    assert (revision_of("org/tiny", c), revision_of("org/words", c)) == ("v1", None)
    roles = Roles(c, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    for role in (
        roles.policy(1e-3),
        roles.reference(),
        roles.reference("org/tiny"),
        roles.scorer("org/tiny", 1e-3),
    ):
        assert role.model.config.num_layers == 5
    check_tokens("org/tiny", load_tokenizer("org/words"), "v1")


def test_a_dry_run_stands_in_for_a_stage_by_its_start_at_that_revision(hub, tmp_path, monkeypatch):
    first, second = at_v1("sft", tmp_path), defaults("dpo")
    second["from"].model = "sft"
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    first.data.sources = second.data.sources = (str(tmp_path / "d.jsonl"),)
    seen = []
    monkeypatch.setattr(trainer, "run", lambda checked, dry_run: seen.append(checked.config.model.to_dict()) or {})
    pipeline.run(stages(str(tmp_path / "runs"), sft=first, dpo=second), dry_run=True, log=lambda line: None)
    assert [(m["path"], m["revision"]) for m in seen] == [("org/tiny", "v1")] * 2

"""`data.chat_template_kwargs`: in every stage's rows and prompts, in the export, in the run's identity."""

import json

import jax
import pytest
from transformers import AutoTokenizer

from jaxalign.cli import main
from jaxalign.config import defaults
from jaxalign.data.build import build
from jaxalign.errors import InputError
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.pipeline.loaded import load_model
from jaxalign.relations import template_kwargs
from jaxalign.rollout.sampling import Sampling
from jaxalign.train import trainer
from tests.data.thinking import HYBRID

EMPTY = "<think>\n\n</think>\n\n"
ASKED = [{"role": "user", "content": "Hi"}]
OFF = ({"enable_thinking": False},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kwargs")
    (folder / "t.jinja").write_text(HYBRID)
    said = [{"role": "assistant", "content": word} for word in ("Yes", "No")]
    pairs = [
        {"prompt": [{"role": "user", "content": f"Is it {i}?"}], "chosen": [said[0]], "rejected": [said[1]]}
        for i in range(8)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "reward.py").write_text(
        "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    return folder


def configured(shared, folder, algorithm, name="run", **data):
    c = defaults(algorithm)
    c.workdir, c.model.path = str(folder / name), str(shared / "models" / "stories260k-llama")
    c.model.chat_template, c.model.remat = str(folder / "t.jinja"), "none"
    c.data.sources, c.data.max_length, c.data.truncation = (str(folder / "pairs.jsonl"),), 160, "drop"
    c.data.update({"chat_template_kwargs": OFF} | data)
    c.batch_size, c.num_train_steps, c.checkpoint.every = 8, 1, 1
    c.logging.trackers, c.logging.progress = (), False
    if algorithm == "ppo":
        c.rewards.function, c.rollout.max_new_tokens, c.algorithm.num_minibatches = (
            f"{folder / 'reward.py'}:score",
            8,
            1,
        )
    return c


@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_every_algorithm_renders_with_the_values(algorithm, shared, folder):
    """The prompts of what is trained on; an empty block of an answer itself is none of them."""
    told = {}
    for values in ((), OFF):
        c = configured(shared, folder, algorithm, f"built-{algorithm}", chat_template_kwargs=values)
        tokenizer = load_tokenizer(c.model.path, None, c.model.chat_template, template_kwargs(values))
        dataset = build(c, tokenizer)
        told[values == OFF] = {tokenizer.decode(dataset.example(i).prompt)[-20:] for i in range(8)}
    assert all(prompt.endswith(EMPTY) for prompt in told[True])
    assert all(prompt.endswith("assistant\n") for prompt in told[False])


@pytest.fixture(scope="module")
def run(request, folder):
    c = configured(request.getfixturevalue("shared"), folder, "sft")
    c.workdir = str(folder / "run" / "sft")
    trainer.run(c, devices=jax.devices()[:1])
    return folder / "run" / "sft"


def test_the_export_renders_as_the_run_did(run, shared, tmp_path, capsys):
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    options = {"tokenize": False, "add_generation_prompt": True}
    bare = AutoTokenizer.from_pretrained(shared / "models" / "stories260k-llama")
    for where in (run / "export", tmp_path / "again"):
        tokenizer = AutoTokenizer.from_pretrained(where)
        want = bare.apply_chat_template(ASKED, chat_template=HYBRID, enable_thinking=False, **options)
        assert tokenizer.apply_chat_template(ASKED, **options) == want and want.endswith(EMPTY)
        assert EMPTY not in tokenizer.apply_chat_template(ASKED, enable_thinking=True, **options)


def test_generation_by_the_export_and_by_a_flag(run, monkeypatch):
    import jaxalign.pipeline.loaded as loaded

    def ids(**options):
        return (
            load_model(str(run / "export"), head="lm", **options)
            .generator(Sampling(0.0, 4))
            .encode([ASKED])[0]
            .tolist()
        )

    make_mesh = loaded.make_mesh
    monkeypatch.setattr(loaded, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))
    off, on = ids(), ids(chat_template_kwargs={"enable_thinking": True})
    assert off[: len(on)] == on and len(off) > len(on)


def test_a_stage_that_goes_on_has_the_template_with_its_values(run, shared, folder, capsys):
    c = configured(shared, folder, "ppo", "next", chat_template_kwargs=())
    c.model.path, c.model.chat_template = str(run / "export"), None
    trainer.run(c, dry_run=True, devices=jax.devices()[:1])
    assert "</think>" in capsys.readouterr().out


@pytest.mark.parametrize("values", [(), ({"enable_thinking": True},)])
def test_a_run_does_not_resume_with_other_values(run, shared, folder, values):
    c = configured(shared, folder, "sft", chat_template_kwargs=values)
    c.workdir, c.num_train_steps = str(run), 2
    with pytest.raises(InputError, match=r"another configuration: .*data\.chat_template_kwargs"):
        trainer.run(c, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"enable_thinkin": true}', "'enable_thinkin', which the chat template never reads"),
        ("{a: 1}", "{a: 1}"),
        ("[1]", "holds [1]"),
    ],
)
def test_values_of_a_command_that_fit_nothing_are_told(run, text, found, capsys):
    flags = ["--prompt", "Hi", "--chat", "--chat_template_kwargs", text]
    assert main(["generate", "--model", str(run / "export"), *flags]) == 2
    told = capsys.readouterr().err
    assert found in told and "--chat_template_kwargs" in told and '{"enable_thinking": ' in told

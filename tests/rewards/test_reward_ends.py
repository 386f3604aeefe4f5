"""Where a reward model is read: at the end of the turn, the same token in training, in PPO, `score` and `compare`."""

import json
from argparse import Namespace

import jax
import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data.build import from_records
from jaxalign.data.records import Record
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.tokenizer import load_tokenizer, stop_ids
from jaxalign.models.transformer import Model
from jaxalign.parallel.mesh import make_mesh
from jaxalign.pipeline import score as score_command
from jaxalign.rewards.load import load_scorer
from jaxalign.rewards.model import ModelScorer
from jaxalign.rewards.samples import Samples
from jaxalign.train import algorithms
from jaxalign.train.models import Roles
from tests.train.ppo_world import drawn, tiny_model

TEXT_END, TURN_END = 0, 2  # minimind's ids of <|endoftext|> and <|im_end|>
ASKED = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def turns(shared):
    """A tokenizer whose EOS ends texts, and whose template ends turns by another id: the form of Qwen's base models."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "minimind-6400")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(TEXT_END)
    assert tokenizer.eos_token_id == TEXT_END
    return tokenizer


@pytest.fixture(scope="module")
def directory(turns, tmp_path_factory):
    """A reward model as a run exports it: the generation config names both ids."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    model = tiny_model("score", vocab_size=6400)
    hf.save(folder, model, jax.tree.map(jax.numpy.asarray, drawn(model, 3)), tokenizer=turns)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TEXT_END, TURN_END]}))
    return folder


def test_trap_a_turn_is_read_at_its_own_end(turns, directory):
    scorer = load_scorer(str(directory), dtype="float32")
    finished, cut = (scorer.tokens(ASKED, "Hello!", end).tolist() for end in (True, False))
    assert finished[-1] == TURN_END and finished.count(TEXT_END) == 0, "neither the newline behind it nor another end"
    assert cut == finished[:-1], "what was cut off has no end"
    assert scorer.tokens(ASKED, "", True).tolist()[-1] == TURN_END
    assert scorer.tokens(ASKED, "", False).tolist() == scorer.tokens(ASKED, "", True).tolist()[:-1]
    assert scorer.tokens("Once", " upon", True).tolist()[-1] == TEXT_END  # a text has no turns


def test_trap_what_was_cut_off_looks_finished_under_no_template(turns):
    """Even where nothing says that the template's end of a turn is one."""
    scorer = ModelScorer(tiny_model("score", vocab_size=6400), turns)
    cut = scorer.tokens(ASKED, "Hello!", False).tolist()
    assert TURN_END not in cut[-3:] and turns.decode(cut).endswith("Hello!")
    assert scorer.tokens(ASKED, "Hello!", True).tolist()[-1] == TEXT_END


def test_training_and_scoring_read_the_same_token(turns, directory, tmp_path):
    c = defaults("reward")
    c.workdir, c.model.path = str(tmp_path), str(directory)
    said = {"chosen": "Hello!", "rejected": "Go away."}
    sides = {side: [{"role": "assistant", "content": text}] for side, text in said.items()}
    records = [Record(0, "d.jsonl", 1, "pair", prompt=ASKED, **sides)]
    ends = stop_ids(directory, turns)
    assert ends == (TEXT_END, TURN_END)
    dataset = from_records(records, c, turns, eos_ids=ends)  # as a reward stage builds it
    example, scorer = dataset.example(0), load_scorer(str(directory), dtype="float32")
    for tokens, text in zip(example.completions, said.values(), strict=True):
        assert scorer.tokens(ASKED, text, True).tolist() == [*example.prompt.tolist(), *tokens.tolist()]
    # `score` gets the rendered text, with the newline that the template writes behind the turn
    rendered = turns.apply_chat_template([*ASKED, *sides["chosen"]], tokenize=False)
    prompt = turns.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    lines = [{"prompt": prompt, "completion": rendered[len(prompt) :]}]
    lines.append({"prompt": prompt, "completion": lines[0]["completion"].rstrip()})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = Samples([ASKED], ["Hello!"], [[1]], [True], records, 0)
    for append in (False, True):  # a turn that has its end gets no other
        with open(tmp_path / "out", "w") as out:
            score_command.score(str(directory), str(tmp_path / "d.jsonl"), append_eos=append, out=out)
        found = [json.loads(line)["score"] for line in (tmp_path / "out").read_text().splitlines()]
        np.testing.assert_allclose(found, scorer(asked) * 2, atol=1e-5)


def test_ppo_reads_text_where_the_policy_ends_by_another_token(turns, directory):
    c = defaults("ppo")
    c.model.path, c.rewards.model = str(directory), str(directory)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    for stops, kind in (((TEXT_END, TURN_END), Model), ((TEXT_END, 7), ModelScorer)):
        context = algorithms.Context(mesh, load_tokenizer(directory), stops, None)
        scorer, _ = algorithms._reward_of(c, Roles(c, mesh), context)
        assert isinstance(scorer, kind)
    assert scorer.encoder.eos_ids == {TEXT_END, TURN_END}


def test_a_value_model_starts_from_a_reward_model_of_the_same_tokens_alone(turns, directory, shared, tmp_path):
    policy = tiny_model(vocab_size=6400, hidden_size=32)
    hf.save(tmp_path / "policy", policy, drawn(policy), tokenizer=turns)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    c = defaults("ppo")
    c.rewards.model, c.batch_size = str(directory), 8
    for path, size in ((tmp_path / "policy", 16), (shared / "models" / "stories260k-llama", 64)):
        c.model.path = str(path)
        tokenizer = load_tokenizer(path)
        context = algorithms.Context(mesh, tokenizer, stop_ids(path, tokenizer), Namespace(record=None))
        program = algorithms.build(c, Roles(c, mesh), context)
        assert program.trained["value"].model.config.hf["hidden_size"] == size


def test_a_score_that_is_not_finite_is_told_where_it_is_given(directory, tmp_path):
    scorer = load_scorer(str(directory), dtype="float32")
    scorer.params["score"]["kernel"] = scorer.params["score"]["kernel"] * np.nan
    records = [Record(0, "d.jsonl", 5, "prompt")]
    with pytest.raises(InputError, match=r"d.jsonl:5 .*is nan") as error:
        scorer(Samples([ASKED], ["Hello!"], [[1]], [True], records, 0))
    assert str(directory) in error.value.found and "learning_rate" not in str(error.value)

"""From prompts to completions as text."""

import jax
import pytest

from jaxalign.data.records import Record
from jaxalign.errors import InputError
from jaxalign.models import hf
from jaxalign.models.tokenizer import load_tokenizer, stop_ids
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.rollout.engine import Generator, continuation, settled_text
from jaxalign.rollout.sampling import Sampling

PROMPTS = ["Once upon a time", "Tom", "The cat sat on the mat and looked at the bird. It was", "Lily said"]


@pytest.fixture(scope="module")
def stories(shared):
    path = shared / "models" / "stories260k-llama"
    model, params = hf.load(path, dtype="float32", param_dtype="float32", remat="none")
    tokenizer = load_tokenizer(path)
    return model, params, tokenizer, stop_ids(path, tokenizer)


def generator(stories, **options):
    model, params, tokenizer, stops = stories
    sampling = Sampling(options.pop("temperature", 1.0), max_new_tokens=12)
    return Generator(model, options.pop("params", params), tokenizer, sampling=sampling, stop_ids=stops, **options)


def test_grouping_and_mesh_do_not_matter(stories):
    """The same samples whatever the batch size, and on eight devices; another seed gives others."""
    whole = generator(stories)(PROMPTS, seed=5)
    assert [c.ids for c in generator(stories, batch_size=3)(PROMPTS, seed=5)] == [c.ids for c in whole]
    assert [c.ids for c in generator(stories)(PROMPTS, seed=6)] != [c.ids for c in whole]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    placed = jax.device_put(stories[1], param_shardings(mesh, stories[1]))
    there = generator(stories, params=placed, mesh=mesh)(PROMPTS[:3], seed=5)  # three prompts fill four rows
    assert [c.ids for c in there] == [c.ids for c in whole[:3]]
    assert all(c.logprob < 0 and len(c.ids) <= 12 for c in whole)


def test_prompt_and_text_are_the_whole_text(stories):
    tokenizer = stories[2]
    for prompt, completion in zip(PROMPTS, generator(stories, temperature=0.0)(PROMPTS, seed=0), strict=True):
        ids = tokenizer(prompt)["input_ids"] + completion.ids
        assert prompt + completion.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert continuation(tokenizer, tokenizer("Tom")["input_ids"], [stories[3][0]]) == ""


def test_messages_are_rendered(stories):
    """Without a chat template as a plain dialogue, up to where the assistant speaks."""
    message = [{"role": "user", "content": "Tell a story"}]
    made = generator(stories, temperature=0.0)
    (one,) = made([message], seed=0)
    (same,) = made(["\n\nHuman: Tell a story\n\nAssistant:"], seed=0)
    assert one.ids == same.ids


def test_records_are_rendered_with_their_columns(stories):
    """What a record gives the template comes into its prompt in evaluation as in training."""
    model, params, tokenizer, stops = stories
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools[0].name if tools }}{{ style }}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        made = Generator(model, params, tokenizer, sampling=Sampling(0.0, 4), stop_ids=stops)
        columns = {"tools": [{"name": "clock"}], "chat_template_kwargs": {"style": "!"}}
        record = Record(7, "x", 1, "prompt", prompt=[{"role": "user", "content": "Time"}], columns=columns)
        assert [tokenizer.decode(ids).strip() for ids in made.encode([record, record.prompt])] == ["Timeclock!", "Time"]
        assert len({tuple(c.ids) for c in made([record, [{"role": "user", "content": "Timeclock!"}]], seed=0)}) == 1
        plain = made([record._replace(prompt="Tom"), "Tom"], seed=0)
    assert plain[0] == plain[1]


def test_a_prompt_without_tokens_is_refused(shared):
    """gpt2 adds no BOS: an empty prompt has nothing to go on from."""
    from tests.train.ppo_world import drawn, tiny_model

    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2")
    tokenizer.bos_token = None
    model = tiny_model(vocab_size=len(tokenizer))
    made = Generator(model, drawn(model), tokenizer, stop_ids=(0,), sampling=Sampling(0.0, 2))
    with pytest.raises(InputError, match="prompt 1 has no token"):
        made(["x", ""], seed=0)


NAMES = ("tokenizers/gpt2", "tokenizers/minimind-6400", "models/stories260k-llama")
SAID = "Déjà vu 😀😀: don't, 中文 ' quoted ' , I 've it\u00a0\ufffd! do n't . ñ"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("joined", [False, True])
def test_settled_text_is_never_taken_back(shared, name, joined):
    """Each prefix of the tokens gives a beginning of the whole text, of half characters nothing."""
    tokenizer = load_tokenizer(shared / name)
    tokenizer.clean_up_tokenization_spaces = joined
    ids = tokenizer(SAID, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    settled = [settled_text(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    assert all(whole.startswith(text) for text in settled)
    assert len(set(settled)) > 8 and len(settled[-1]) > len(whole) - 10

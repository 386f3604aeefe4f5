"""Records to examples, with every shared tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.dialogues import render_plain
from jaxalign.data.mixture import load_records
from jaxalign.data.records import Record
from jaxalign.data.tokenize import Dropped, Encoder, tokenize_records
from jaxalign.registry import PAIRS as READ_PAIRS


def _pair(prompt, chosen, rejected, **more):
    return Record(0, "x", 1, "pair", prompt=prompt, chosen=chosen, rejected=rejected, **more)


def _one(record, encoder, **options):
    (example,) = tokenize_records([record], encoder, **{"append_eos": False, **options})
    return example


def _whole(encoder, text):
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoder.prefix + ids


class Offsetless:
    """A tokenizer that does not tell offsets, as those in plain Python do."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._tokenizer(text, **options)


PAIRS = [
    ("The capital is Paris ", "London", " big"),
    ("Paris ", "London", "Londres"),
    ("Question:", " yes", " no"),
    ("Question: ", "yes", "no"),
    ("un", "happy", "harmed"),
    ("日本", "語です", "人"),
    ("a\n", "\nb", "c"),
    ("x" * 7, "x" * 9, "x" * 10),
    ("", "alone", "along"),
]


@pytest.mark.parametrize("texts", PAIRS, ids=lambda t: repr(t[0])[:12])
def test_trap_prompt_boundary(tokenizer, texts):
    """A pair's prompt is the longest common token prefix that ends at or before the stated boundary."""
    encoder = Encoder(tokenizer)
    prompt, chosen, rejected = texts
    example = _one(_pair(*texts), encoder)
    wholes, heads = [], []
    for said in (chosen, rejected):
        whole = _whole(encoder, prompt + said)
        offsets = tokenizer(prompt + said, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        ends = [0] * (len(whole) - len(offsets)) + [end for _, end in offsets]
        at = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
        wholes.append(whole)
        heads.append(whole[:at])
    longest = next(heads[0][:n] for n in range(len(heads[0]), -1, -1) if heads[0][:n] == heads[1][:n])
    if not longest and tokenizer.bos_token_id is not None:  # a prompt of BOS
        longest, wholes = [tokenizer.bos_token_id], [[tokenizer.bos_token_id, *w] for w in wholes]
    elif not longest and wholes[0][0] == wholes[1][0]:  # or of the token that both sides begin with
        longest = wholes[0][:1]
    elif not longest:
        assert example == Dropped(0, "no prompt, and the tokenizer has no BOS token")
        return
    assert example.prompt.tolist() == longest
    for ids, mask, whole in zip(example.completions, example.masks, wholes, strict=True):
        assert longest + ids.tolist() == whole
        assert mask.all()


def test_trap_prompt_boundary_without_offsets(tokenizer):
    for texts in PAIRS:
        record = _pair(*texts)
        want, got = (_one(record, Encoder(t)) for t in (tokenizer, Offsetless(tokenizer)))
        if isinstance(want, Dropped):
            assert got == want
            continue
        # Without offsets a character's bytes cannot be told apart, so a prompt may end some tokens earlier.
        assert got.prompt.tolist() == want.prompt.tolist()[: len(got.prompt)]
        assert len(want.prompt) - len(got.prompt) <= 3
        for a, b in zip(got.completions, want.completions, strict=True):
            assert np.concatenate([got.prompt, a]).tolist() == np.concatenate([want.prompt, b]).tolist()


def test_trap_one_bos_at_the_start(tokenizer):
    encoder = Encoder(tokenizer)
    bos = tokenizer.bos_token or ""
    for text in ("Some text.", bos + "Some text.", bos + bos + "Some text."):
        (example,) = tokenize_records([Record(0, "x", 1, "text", text=text)], encoder, append_eos=False)
        if tokenizer.bos_token_id is None:
            continue
        ids = [*example.prompt.tolist(), *example.completions[0].tolist()]
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        pair = _one(_pair(text, " yes", " no"), encoder)
        for completion in pair.completions:
            assert tokenizer.bos_token_id not in completion


def test_trap_eos_is_appended_once(tokenizer):
    encoder = Encoder(tokenizer)
    for said in ("an answer", "an answer" + tokenizer.eos_token):
        example = _one(Record(0, "x", 1, "completion", prompt="Q: ", completion=said), encoder, append_eos=True)
        assert example.completions[0].tolist().count(tokenizer.eos_token_id) == 1
        assert example.completions[0][-1] == tokenizer.eos_token_id and example.masks[0][-1]
        assert example.complete == (True,)
        bare = _one(Record(0, "x", 1, "completion", prompt="Q: ", completion=said), encoder, append_eos=False)
        assert bare.complete == (said.endswith(tokenizer.eos_token),)


def test_trap_any_of_several_eos_ids_counts(tokenizer_of):
    tokenizer = tokenizer_of("models/stories3m-llama")  # ends a story with <s>
    record = Record(0, "x", 1, "completion", prompt="Once", completion=" upon a time.<s>")
    told = _one(record, Encoder(tokenizer, eos_ids=(1, 2)), append_eos=True)
    assert told.completions[0][-1] == 1 and told.complete == (True,)
    untold = _one(record, Encoder(tokenizer), append_eos=True)
    assert untold.completions[0][-2:].tolist() == [1, 2]


@pytest.mark.parametrize(
    "record",
    [
        Record(0, "x", 1, "completion", prompt="Q", completion=""),
        Record(0, "x", 1, "completion", prompt="Q", completion="</s>"),
        Record(0, "x", 1, "text", text=""),
        Record(0, "x", 1, "messages", messages=[{"role": "user", "content": "Q"}]),
    ],
)
def test_trap_an_empty_completion_is_dropped(tokenizer_of, record):
    encoder = Encoder(tokenizer_of("models/stories3m-llama"), plain=render_plain)
    assert _one(record, encoder, append_eos=True) == Dropped(0, "empty completion")


def test_a_pair_of_equal_sides_is_dropped(tokenizer_of):
    encoder = Encoder(tokenizer_of("models/stories3m-llama"))
    assert _one(_pair("Q", " a", " a"), encoder, append_eos=True) == Dropped(0, "chosen equals rejected")
    # One side with its EOS, the other to be given it.
    assert _one(_pair("Q", " a", " a</s>"), encoder, append_eos=True) == Dropped(0, "chosen equals rejected")


U, A, V = ({"role": r, "content": c} for r, c in (("user", "How?"), ("assistant", "So."), ("user", "And then?")))
B, C = ({"role": "assistant", "content": c} for c in ("Done.", "Nothing."))
W = {"role": "user", "content": "And why?"}


@pytest.mark.parametrize("name", ["tokenizers/qwen2-rebuilt", "tokenizers/minimind-6400", "models/stories3m-llama"])
def test_trap_multi_turn_pairs_score_only_the_assistant_behind_the_parting(name, tokenizer_of):
    encoder = Encoder(tokenizer_of(name), plain=render_plain)
    decode = encoder.tokenizer.decode
    late = _one(_pair([U, A, V], [B], [C]), encoder)  # parts in the last turn
    for ids, mask, said in zip(late.completions, late.masks, ("Done.", "Nothing."), strict=True):
        assert mask.all() and decode(ids).strip().startswith(said)
    assert "So." in decode(late.prompt) and "And then?" in decode(late.prompt)
    early = _one(_pair([U, A], [V, B], [W, C]), encoder)  # parts in a user's turn
    for ids, mask, said, unsaid in zip(
        early.completions, early.masks, ("Done.", "Nothing."), ("then?", "why?"), strict=True
    ):
        assert said in decode(ids[mask]) and unsaid not in decode(ids[mask])
        assert unsaid in decode(ids)
    turns = _one(_pair([U], [A, V, B], [C, W, A]), encoder)  # more than one turn on each side
    assert "then?" in decode(turns.completions[0]) and "then?" not in decode(turns.completions[0][turns.masks[0]])
    assert "So." in decode(turns.completions[0][turns.masks[0]])


def test_sft_on_all_scores_the_prompt_too(tokenizer):
    encoder = Encoder(tokenizer)
    record = Record(0, "x", 1, "completion", prompt="Question: why?", completion=" Because.")
    every = _one(record, encoder, append_eos=True, train_on="all")
    some = _one(record, encoder, append_eos=True)
    assert len(every.prompt) == 1 and every.masks[0].all()
    ids = [np.concatenate([e.prompt, e.completions[0]]).tolist() for e in (every, some)]
    assert ids[0][-len(ids[1]) :] == ids[1]  # at most a BOS more
    assert some.masks[0].sum() < every.masks[0].sum()


def test_prompts_to_sample_from(tokenizer_of):
    tokenizer = tokenizer_of("tokenizers/qwen2-rebuilt")
    example = _one(Record(0, "x", 1, "prompt", prompt=[U]), Encoder(tokenizer))
    want = tokenizer.apply_chat_template([U], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example.prompt.tolist() == want and example.completions == ()
    llama = tokenizer_of("models/stories3m-llama")
    assert (
        _one(Record(0, "x", 1, "prompt", prompt="Once"), Encoder(llama)).prompt.tolist() == llama("Once")["input_ids"]
    )
    assert _one(Record(0, "x", 1, "prompt", prompt=""), Encoder(llama)).prompt.tolist() == [1]


def test_weights_and_scores_are_carried(tokenizer_of):
    example = _one(_pair("Q", " a", " b", weight=0.5, score=2.25), Encoder(tokenizer_of("models/stories3m-llama")))
    assert (example.weight, example.score) == (0.5, 2.25)


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_any_pair_is_the_tokens_of_its_texts(tokenizer_of, prompt, chosen, rejected):
    encoder = Encoder(tokenizer_of("models/stories3m-llama"))
    example = _one(_pair(prompt, chosen, rejected), encoder)
    if isinstance(example, Dropped):
        return
    assert len(example.prompt) >= 1
    for said, ids, mask in zip((chosen, rejected), example.completions, example.masks, strict=True):
        tokens = np.concatenate([example.prompt, ids]).tolist()
        assert tokens[0] == 1
        assert [t for t in tokens if t != 1] == [t for t in _whole(encoder, prompt + said) if t != 1][: len(tokens)]
        assert mask.all()


@pytest.mark.parametrize("name, end", [("tokenizers/qwen2-rebuilt", "<|im_end|>"), ("models/stories3m-llama", "</s>")])
def test_trap_real_dialogues_score_the_assistant_alone(shared, tokenizer_of, name, end):
    records, _ = load_records(str(shared / "data/hh-rlhf/helpful-base.test.jsonl.gz"), READ_PAIRS, max_records=300)
    encoder = Encoder(tokenizer_of(name), plain=render_plain)
    decode = encoder.tokenizer.decode
    examples = list(tokenize_records(records, encoder, append_eos=True))
    assert sum(isinstance(e, Dropped) for e in examples) < 5
    for record, example in zip(records, examples, strict=True):
        if isinstance(example, Dropped):
            continue
        for side, ids, mask in zip((record.chosen, record.rejected), example.completions, example.masks, strict=True):
            said = "".join(m["content"] for m in side if m["role"] == "assistant")
            assert "".join(decode(ids[mask]).replace(end, "").split()) == "".join(said.split())
            assert decode(ids).endswith(end)
        for message in record.prompt:
            assert "".join(message["content"].split()) in "".join(decode(example.prompt).split())

"""Datasets of real records: batches by index, shapes, splits, epochs, processes, errors."""

import gzip
import json
import threading

import numpy as np
import pytest

from jaxalign.config import defaults
from jaxalign.data.build import build as build_dataset
from jaxalign.data.build import from_records
from jaxalign.data.dataset import DataStreamError
from jaxalign.data.prefetch import prefetch
from jaxalign.data.promises import check_layout
from jaxalign.data.records import Record
from jaxalign.errors import InputError
from jaxalign.registry import ALGORITHMS
from jaxalign.types import CausalByIndex, CausalByPosition

PURPOSES = tuple(ALGORITHMS)


@pytest.fixture(scope="module")
def pairs(polite_rude):
    return [
        Record(
            i, "rude.json", i + 1, "pair", prompt=r["instruction"] + "\n", chosen=r["chosen"], rejected=r["rejected"]
        )
        for i, r in enumerate(polite_rude)
    ]


def _read_by(purpose, records):
    """Pairs as an algorithm reads them: the better side, or the prompt alone."""
    forms = ALGORITHMS[purpose].reads.forms
    if "pair" in forms:
        return records
    form = "prompt" if "prompt" in forms else "completion"
    return [r._replace(form=form, completion=r.chosen) if r.form == "pair" else r for r in records]


def _config(tmp_path, purpose, **data):
    config = defaults(purpose)
    config.workdir, config.batch_size, config.seed = str(tmp_path), 8, 3
    config.data.max_length = 256
    if purpose == "sft":
        config.data.packing = False
    config.data.update(data)
    return config


@pytest.fixture
def build(tmp_path, tokenizer_of, pairs):
    def _build(purpose, records=None, split="train", tokenizer="models/stories3m-llama", like=None, **data):
        config = _config(tmp_path, purpose, **data)
        records = pairs[:200] if records is None else records
        return from_records(_read_by(purpose, records), config, tokenizer_of(tokenizer), split, like=like)

    return _build


def _leaves(batch):
    return [np.asarray(a) for part in (batch.rows[:4], *batch[1:3]) for a in part] + [batch.record_ids]


def _equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(_leaves(a), _leaves(b), strict=True))


def _ids(dataset, epoch=0):
    n = dataset.batches_per_epoch
    ids = [dataset.batch(i).record_ids for i in range(epoch * n, epoch * n + n)]
    return [sorted({int(i) for i in row if i >= 0}) for batch in ids for row in batch]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_epoch_holds_every_record_once_in_one_shape(build, purpose, packing):
    dataset = build(purpose, packing=packing)
    for epoch in (0, 2):
        rows = _ids(dataset, epoch)
        assert sorted(i for row in rows for i in row) == list(range(dataset.num_records))
        if not packing or purpose == "ppo":
            assert max(map(len, rows)) == 1
    shapes = {tuple(a.shape for a in _leaves(dataset.batch(i))) for i in range(2 * dataset.batches_per_epoch)}
    b, t, m, c = dataset.shape
    assert dataset.widths == (t,) or (purpose == "ppo" and dataset.widths[-1] == t)
    assert shapes <= {((b, w),) * 4 + ((b, m),) * 4 + ((b, c),) * 7 for w in dataset.widths}
    dtypes = {a.dtype for a in _leaves(dataset.batch(0))}
    assert dtypes == {np.dtype(np.int32), np.dtype(np.float32), np.dtype(bool)}


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_is_a_function_of_seed_and_index(build, packing):
    one, other = (build("dpo", packing=packing) for _ in range(2))
    late = 5 * one.batches_per_epoch + 1
    other.batch(0)
    assert _equal(one.batch(late), other.batch(late))
    assert not _equal(one.batch(0), one.batch(one.batches_per_epoch))
    assert one.fingerprint == other.fingerprint


def test_processes_read_parts_of_the_same_batch(build):
    dataset = build("dpo", packing=True)
    whole = _leaves(dataset.batch(1))
    parts = [_leaves(dataset.batch(1, p, 4)) for p in range(4)]
    for want, got in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(got), want)
    with pytest.raises(InputError, match="batch_size 8 for 3 processes"):
        dataset.batch(0, 0, 3)


def test_the_last_batch_is_filled_with_empty_rows(build, pairs):
    dataset = build("dpo", records=pairs[:11], shuffle=False)
    assert (dataset.num_records, dataset.batches_per_epoch) == (11, 2)
    last = dataset.batch(1)
    assert last.completions.mask.sum(1).tolist() == [2, 2, 2, 0, 0, 0, 0, 0]
    assert not last.readouts.mask[3:].any() and (last.record_ids[3:] == -1).all()
    assert _ids(dataset) == [[i] for i in range(11)] + [[]] * 5


def test_records_and_examples_by_id(build, pairs):
    dataset = build("reward")
    batch = dataset.batch(0)
    for row in range(8):
        i = int(batch.record_ids[row, 0])
        record, example = dataset.record(i), dataset.example(i)
        assert record == pairs[record.index] and example.record == i
        assert batch.rows.tokens[row, : len(example.completions[0])].tolist() == example.completions[0][::-1].tolist()


def test_the_cache_is_used_and_never_stale(build, tmp_path, pairs, monkeypatch):
    first = build("dpo")
    monkeypatch.setattr("jaxalign.data.build.tokenize_records", None)  # would fail if it were called
    assert build("dpo").fingerprint == first.fingerprint
    monkeypatch.undo()
    changed = [
        build("dpo", records=[*pairs[:199], pairs[199]._replace(chosen="other")]),
        build("dpo", max_length=200),
        build("dpo", append_eos=False),
        build("dpo", truncation="keep_end"),
        build("reward"),
        build("dpo", tokenizer="tokenizers/gpt2"),
    ]
    assert len({d.fingerprint for d in [first, *changed]}) == 7


@pytest.mark.parametrize("purpose", PURPOSES)
def test_trap_no_prompt_is_in_both_splits(build, pairs, purpose):
    doubled = [r._replace(index=i) for i, r in enumerate(pairs[:100] + pairs[:100])]  # a source of weight 2
    train, held = (build(purpose, records=doubled, split=s, eval_fraction=0.2) for s in ("train", "eval"))
    prompts = [{d.record(i).prompt for i in range(d.num_records)} for d in (train, held)]
    assert not prompts[0] & prompts[1]
    assert train.num_records + held.num_records == build(purpose, records=doubled).num_records
    assert 0.1 * len(doubled) < held.num_records <= 0.2 * len(doubled)
    assert not np.isin(held.keys("group"), train.keys("group")).any()
    assert train.fingerprint != held.fingerprint
    assert [r for r in _ids(held) if r] == [[i] for i in range(held.num_records)]  # evaluation is not shuffled


def test_a_split_needs_more_than_one_prompt(build, pairs):
    same = [pairs[0]._replace(index=i, line=i, chosen=f"{i}") for i in range(5)]
    with pytest.raises(InputError, match="1 different prompts"):
        build("dpo", records=same, eval_fraction=0.2)


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_takes_the_shape_of_training_where_it_fits(build, pairs, packing):
    train = build("sft", eval_fraction=0.2, packing=packing)
    held = build("sft", split="eval", eval_fraction=0.2, like=train, packing=packing)
    assert held.shape == train.shape
    assert held.batch(0).rows.tokens.shape == train.batch(0).rows.tokens.shape
    small = build("sft", records=[pairs[0]], packing=packing)
    assert build("sft", records=[pairs[0]], like=train, packing=packing).shape == train.shape != small.shape
    assert build("sft", like=small, packing=packing).shape == build("sft", packing=packing).shape  # it does not fit


def test_rows_have_the_length_that_the_config_says(build):
    assert build("dpo", row_length=200).shape.length == 200
    assert build("sft", row_length=200, packing=True).shape.length == 200
    assert build("sft", max_length=100).shape.length == 100  # capped, not rounded beyond it
    assert build("dpo").shape.length % 64 == 0
    dropped = build("dpo", row_length=40)
    assert dropped.counts()["dropped: longer than row_length"] == 199 - dropped.num_records > 0
    assert dropped.shape.length == 40


def test_limits_of_prompts_to_sample_from(tmp_path, tokenizer_of, pairs):
    config = _config(tmp_path, "ppo", max_length=60)
    config.rollout.max_new_tokens = 40
    dataset = from_records(_read_by("ppo", pairs), config, tokenizer_of("models/stories3m-llama"))
    assert dataset.shape.length <= 20 and dataset.lengths()["prompt"].max() <= 20
    reason = "dropped: prompt and max_new_tokens longer than max_length"
    assert dataset.counts() == {reason: len(pairs) - dataset.num_records} and dataset.num_records < len(pairs)


def test_records_of_a_form_that_is_not_read_are_an_error(tmp_path, tokenizer_of, pairs):
    with pytest.raises(InputError, match="form 'pair'"):
        from_records(pairs, _config(tmp_path, "sft"), tokenizer_of("models/stories3m-llama"))


def test_nothing_left_says_why_and_what_to_do(build):
    with pytest.raises(InputError) as error:
        build("dpo", max_prompt_length=2)
    assert (
        "no usable record among 200: prompt longer than max_prompt_length (199), chosen equals rejected (1)"
        in error.value.found
    )
    with pytest.raises(InputError, match="prompt and completion longer than max_length"):
        build("dpo", max_length=4)


@pytest.mark.parametrize(
    ("purpose", "limits"),
    [
        ("dpo", {"max_prompt_length": 2}),
        ("dpo", {"max_completion_length": 2}),
        ("dpo", {"max_length": 4}),
        ("dpo", {"max_length": 4, "max_prompt_length": 2, "max_completion_length": 2}),
        ("dpo", {"row_length": 8}),
        ("dpo", {"max_length": 4, "truncation": "keep_start"}),
        ("sft", {"max_completion_length": 2}),
        ("ppo", {"max_length": 64}),
        ("ppo", {"max_prompt_length": 2}),
    ],
)
def test_the_line_that_is_offered_where_nothing_is_left_lets_every_record_in(
    tmp_path, tokenizer_of, pairs, purpose, limits
):
    def build():
        return from_records(_read_by(purpose, pairs[:20]), config, tokenizer_of("models/stories3m-llama"))

    config = _config(tmp_path, purpose, **limits)
    if purpose == "ppo":
        config.rollout.max_new_tokens = 62
        config.data.max_length = limits.get("max_length", 256)
    with pytest.raises(InputError) as error:
        build()
    first, *other = error.value.fix.split(" or ")
    assert other == ([] if "truncation" in limits else ["--config.data.truncation=keep_start"])
    for flag in first.split():
        field, value = flag.removeprefix("--config.data.").split("=")
        config.data[field] = int(value)
    assert build().num_records == 20


def test_build_reads_sources(tmp_path, tokenizer_of, shared):
    config = _config(
        tmp_path, "dpo", sources=(str(shared / "data/rasbt-preference/instruction-data-with-preference.json"),)
    )
    tokenizer = tokenizer_of("models/stories3m-llama")
    assert build_dataset(config, tokenizer, "eval") is None
    config.data.eval_fraction, config.data.max_records = 0.1, 100
    train = build_dataset(config, tokenizer)
    held = build_dataset(config, tokenizer, "eval", like=train)
    assert train.num_records + held.num_records == 100
    assert train.report["records"]["read"] >= 100 and held.report["overlap"] == {"prompts": 0, "records": 0}
    assert train.record(0).columns is not None and (tmp_path / "cache").is_dir()


@pytest.mark.parametrize(
    "purpose, data",
    [
        ("sft", {"packing": True}),
        *((p, {}) for p in PURPOSES),
        ("dpo", {"shared_prompt": False}),
        ("dpo", {"packing": True}),
    ],
)
def test_rows_keep_what_they_promise(build, purpose, data):
    """Causal by index where no token sees a later one; else none sees a later position, nor another of its own."""
    rows = build(purpose, **data).batch(0).rows
    sees_later = (rows.attend_end > np.arange(rows.tokens.shape[1]) + 1).any()
    assert isinstance(rows.causal, CausalByPosition if sees_later else CausalByIndex)
    check_layout(rows)


@pytest.mark.parametrize("depth", [0, 2])
def test_trap_an_error_in_the_stream_is_delivered_with_its_record(build, depth):
    dataset = build("dpo", shuffle=False)
    dataset._store.table = dataset._store.table.copy()
    dataset._store.table["start"][17] = -5  # a record whose tokens cannot be read as they were laid out
    dataset._store.table["prompt"][17] = 10_000_000
    seen = []
    with pytest.raises(DataStreamError, match="batch 2, record 17: ValueError"):
        for index, _ in dataset.batches(0, 6, depth=depth):
            seen.append(index)
    assert seen == [0, 1]


def test_prefetching_keeps_order_and_ends_its_thread():
    before = threading.active_count()
    stream = prefetch(lambda i: i, 0, None, depth=3)
    assert [next(stream) for _ in range(4)] == [(i, i) for i in range(4)]
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    made = []
    stream = prefetch(lambda i: made.append(i) or i, 0, 100, depth=2)
    next(stream)
    threading.Event().wait(0.3)
    assert len(made) <= 5  # bounded
    stream.close()
    assert list(prefetch(str, 3, 3, depth=2)) == []


# (file, columns that make the text, tokenizer, max_length): real lengths, rows packed by default settings
REAL = [
    ("imdb/train.jsonl.gz", ("text",), "models/stories3m-llama", 1024),
    ("tinystories-sample/stories.jsonl", None, "models/stories3m-llama", 1024),
    ("gsm8k/train.jsonl", ("question", "answer"), "tokenizers/gpt2", 1024),
    ("rasbt-preference/instruction-data.json", ("instruction", "input", "output"), "tokenizers/qwen2-rebuilt", 1024),
]


@pytest.mark.parametrize("file, columns, name, max_length", REAL, ids=[r[0].split("/")[0] for r in REAL])
def test_packed_rows_of_real_data_are_98_percent_full(shared, tmp_path, tokenizer_of, file, columns, name, max_length):
    path = shared / "data" / file
    text = (gzip.open if path.suffix == ".gz" else open)(path, "rt").read()
    rows = (
        json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n")[:1500] if line]
    )
    columns = columns or tuple(rows[0])
    records = [
        Record(
            i,
            file,
            i + 1,
            "completion",
            prompt="".join(r[c] + "\n" for c in columns[:-1]),
            completion=str(r[columns[-1]]),
        )
        for i, r in enumerate(rows)
    ]
    config = _config(tmp_path, "sft", packing=True, max_length=max_length)
    dataset = from_records(records, config, tokenizer_of(name))
    plan = dataset.plan(1)
    tokens = sum(dataset.lengths()["prompt"]) + dataset.lengths()["completions"].sum()
    full = tokens / (plan.num_rows * dataset.shape.length)
    print(f"{file}: {full:.4f} of {dataset.shape}, {dataset.num_records} records")
    assert full >= 0.98

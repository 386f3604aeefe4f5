"""The stories run without its training: how data are cut, judged, paired and summed up."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxalign.errors import InputError
from jaxalign.evaluate import wordbag
from jaxalign.examples import reviews, stories
from jaxalign.pipeline.configfile import load_config
from jaxalign.rollout.engine import Completion

ROOT = Path(__file__).resolve().parents[2]
GOOD, BAD = "a fine warm film that i loved", "a dull cold film that i hated"


def review(number, label):
    return {
        "text": f"Film {number} here is {'a joy' if label else 'a bore'} to see. I said so at once!",
        "label": label,
    }


def folder(tmp_path):
    """A small copy of what the shared folder holds, with a line separator that is no newline in one review."""
    import gzip

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    train = [review(i, i % 2) for i in range(60)]
    train[3]["text"] = "Not\u0085one line of it is good to me. No."
    write(tmp_path / "data/imdb/train.jsonl.gz", [*train, train[5]])
    write(tmp_path / "data/imdb/test.jsonl.gz", [train[7], *(review(100 + i, i % 2) for i in range(40))])
    said = [
        {"chosen": f"\n\nHuman: Q{i}\n\nAssistant: Yes!", "rejected": f"\n\nHuman: Q{i}\n\nAssistant: No."}
        for i in range(8)
    ]
    write(tmp_path / "data/hh-rlhf/a.jsonl.gz", said)
    write(tmp_path / "data/hh-rlhf/b.jsonl.gz", [{k: v + "." for k, v in said[7].items()}])
    polite = [
        {"instruction": f"Do {i}", "input": "", "output": "x", "chosen": "Sure.", "rejected": "No."} for i in range(9)
    ]
    (tmp_path / "data/rasbt-preference").mkdir()
    (tmp_path / "data/rasbt-preference/instruction-data-with-preference.json").write_text(json.dumps(polite))
    return tmp_path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What write_data made of it."""
    shared = folder(tmp_path_factory.mktemp("shared"))
    out = tmp_path_factory.mktemp("data")
    config = load_config(str(ROOT / "configs/stories.py"))
    sizes = config.prepare.copy_and_resolve_references()
    with sizes.unlocked():
        sizes.update(heldout_reviews=10, prompt_reviews=20, labelled_reviews=20, polite_heldout=2, dialogues_heldout=1)
        sizes.update(min_words=3)
    facts = reviews.write_data(out, shared, sizes)
    return facts, {path.stem: reviews.read_lines(path) for path in out.glob("*.jsonl")}, sizes, shared


def test_a_config_names_its_data_in_its_workdir():
    config = load_config(f"{ROOT / 'configs/stories.py'}:somewhere/else")
    assert config.workdir == "somewhere/else"
    for name in config.stages:
        assert all(source.startswith("somewhere/else/data/") for source in config[name].data.sources)


def test_trap_a_line_ends_at_a_newline_alone(written):
    """str.splitlines() cuts reviews at U+0085."""
    _, files, _, shared = written
    whole = reviews.read_lines(shared / "data/imdb/train.jsonl.gz")
    assert len(whole) == 61
    assert any("\u0085" in row["text"] for row in whole)
    assert all(isinstance(row, dict) for rows in files.values() for row in rows)


def test_trap_held_out_texts_are_not_trained_on(written):
    facts, files, _, shared = written
    assert facts["counts"] == {name: len(rows) for name, rows in files.items()}
    judged = {row["text"] for row in reviews.read_lines(shared / "data/imdb/test.jsonl.gz")}
    openings = {reviews.opening(text, 30) for text in judged}
    trained = {row["text"] for row in files["reviews"]}
    assert trained and trained & openings == set(), "a review of the judge's half is trained on"
    assert len(trained) == len(files["reviews"]), "a review is there twice"
    heldout = {row["text"] for row in files["reviews_heldout"]}
    assert heldout and heldout & trained == set()
    texts = {
        name: {row[side] for row in files[name] for side in ("chosen", "rejected")}
        for name in ("labels", "labels_heldout")
    }
    assert texts["labels"] & texts["labels_heldout"] == set()
    asked = [{row["prompt"] for row in files[name]} for name in ("prompts", "prompts_heldout")]
    assert all(asked) and asked[0] & asked[1] == set()
    assert not any(text.startswith(prompt) for text in trained for prompt in asked[0] | asked[1])


def test_dialogues_of_one_opening_stay_on_one_side(written):
    _, files, _, _ = written
    openings = [{reviews.first_turn(row) for row in files[name]} for name in ("hh", "hh_heldout")]
    assert openings[1] == {"Q7"} and "Q7" not in openings[0]
    assert len(files["hh_heldout"]) == 2
    assert len(files["polite"]) == 7


def test_pairs_of_labels_are_of_like_length():
    rng = np.random.default_rng(0)
    texts = [
        {"text": " ".join(["w"] * int(n)), "label": int(label)} for label in (0, 1) for n in rng.integers(3, 30, 200)
    ]
    pairs = list(reviews.label_pairs(texts[:350]))
    gaps = [len(p["chosen"].split()) - len(p["rejected"].split()) for p in pairs]
    assert len(pairs) == 150 and np.abs(gaps).max() <= 3 and abs(np.mean(gaps)) < 1


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="JAXALIGN_SHARED"):
        reviews.read_lines(tmp_path / "none.jsonl.gz")


def test_the_judge_counts_words_only(tmp_path):
    judge = wordbag.fit([GOOD, BAD] * 20, [1, 0] * 20)
    scores = judge.scores([GOOD, BAD, "loved warm film fine", "Loved, WARM! film... fine fine", "film", "unheard"])
    assert scores[0] > 1 and scores[1] < -1
    assert scores[2] == pytest.approx(scores[3], abs=1e-12), "order, case and number do not count"
    assert abs(scores[4] - scores[5]) < 0.2, "what both labels say tells nothing"
    assert wordbag.accuracy(judge, [GOOD, BAD, GOOD], [1, 0, 0]) == pytest.approx(2 / 3)
    judge.save(tmp_path / "judge.npz")
    assert wordbag.WordBag.load(tmp_path / "judge.npz").scores([GOOD]) == scores[:1]
    with pytest.raises(ValueError, match="labels"):
        wordbag.fit([GOOD], [1])


def completion(text, finished):
    return Completion(text, [5], -1.0, finished)


def test_trap_an_unfinished_sample_gets_no_eos():
    found = [completion(" good", True), completion(" same", True), completion(" ", True)]
    found += [completion(" bad and", False), completion(" same", True), completion(" x", True)]
    pairs = stories.ordered_pairs(["A", "B", "C"], found, [1.0, 2.0, 0.0, 3.0, 2.0, 1.0], "</s>")
    assert pairs == [{"prompt": "A", "chosen": " bad and", "rejected": " good</s>"}]
    config = load_config(str(ROOT / "configs/stories.py"))
    assert config.dpo.data.append_eos is False


def test_what_is_made_is_kept_until_its_key_changes(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"n": len(calls)}

    path = tmp_path / "made.json"
    assert [stories._kept(path, key, make)["n"] for key in ("a", "a", "b")] == [1, 1, 2]


def test_an_unknown_argument_is_refused(capsys):
    assert stories.main(["--workdir=x"]) == 2
    assert "--config.workdir=x" in capsys.readouterr().err


def test_the_page_shows_every_stage():
    rate = {"rate": 0.8, "low": 0.75, "high": 0.85}
    stage = {"seconds": 12.0}
    summary = {
        "config": {"stages": ["sft", "reward", "dpo"]},
        "sft": {**stage, "positive": 0.5, "finished": 0.9, "mean_length": 40.0, "distinct_2": 0.7, "kl_to_base": 0.0},
        "reward": {**stage, "accuracy": rate},
        "dpo": {**stage, "win_rate": rate, "own_win_rate": rate, "kl_to_base": 3.0},
        "judge": {"trained_on": 25000, "reviews": 5000, "accuracy": 0.88, "accuracy_on_openings": 0.7},
        "data": {"longer_is_better": {"hh": 0.5}},
        "samples": {"dpo": [{"prompt": "I saw", "sft": " it.", "dpo": " it and loved it.", "judge": [0.1, 2.0]}]},
        "stage_seconds": 36.0,
    }
    text = stories.page(summary)
    for expected in ("80.0% (75.0% to 85.0%)", "[judge +2.0]", "3.00", "88.0%", "hh 50.0%"):
        assert expected in text

"""The quickstart's world: its gold preference, and that nothing short of it tells good from bad."""

import collections
import json
import math

import pytest

from jaxalign.examples import quickstart, world
from jaxalign.examples.assets import write_assets


def test_gold_reward_by_hand():
    scene = world.Scene("Mara", "winter", ("door", "lake", "owl", "lamp"))
    right = {thing: world.FACTS["winter", thing] for thing in scene.asked}
    wrong = world.FACTS["summer", "door"]
    all_right = f" The door is {right['door']}, the lake is {right['lake']}, the owl is {right['owl']}"
    all_right += f" and the lamp is {right['lamp']}."
    assert world.gold_reward(scene.prompt, all_right) == 1
    assert world.gold_reward(scene.prompt, all_right.replace(right["door"], wrong, 1)) == pytest.approx(0.5)
    assert world.gold_reward(scene.prompt, "") == -1
    # what is said twice counts once, and what was not asked counts against
    assert world.gold_reward(scene.prompt, all_right + all_right) == 1
    assert world.gold_reward(scene.prompt, all_right + " The boat is red.") == pytest.approx(0.6)
    with pytest.raises(ValueError, match="not a prompt of this world"):
        world.gold_reward("Tell me a joke.", all_right)


def test_the_world_is_a_function_of_its_seed():
    assert world.preferences(20, seed=3) == world.preferences(20, seed=3)
    assert world.preferences(20, seed=3) != world.preferences(20, seed=4)
    pairs = world.preferences(200, seed=0)
    assert all(
        world.gold_reward(p["prompt"], p["chosen"]) > world.gold_reward(p["prompt"], p["rejected"]) for p in pairs
    )


def test_neither_length_nor_token_frequency_shows_the_preference():
    """A bag of words fitted on the answers alone ranks held-out pairs by chance, and lengths are equal."""
    pairs, held_out = world.preferences(8000, seed=0), world.preferences(1000, seed=1)
    assert all(len(p["chosen"].split()) == len(p["rejected"].split()) for p in pairs)
    chosen = collections.Counter(word for p in pairs for word in p["chosen"].split())
    rejected = collections.Counter(word for p in pairs for word in p["rejected"].split())
    weight = {word: math.log((chosen[word] + 1) / (rejected[word] + 1)) for word in chosen | rejected}

    def score(text):
        return sum(weight.get(word, 0.0) for word in text.split())

    ranked = sum(score(p["chosen"]) > score(p["rejected"]) for p in held_out) / len(held_out)
    assert 0.42 < ranked < 0.58


def test_assets_are_written_once(tmp_path):
    directory = write_assets(tmp_path / "world", seed=5)
    config = json.loads((directory / "model" / "config.json").read_text())
    assert config["vocab_size"] % 64 == 0
    prompts = {json.loads(line)["prompt"] for line in (directory / "prompts_heldout.jsonl").read_text().splitlines()}
    assert len(prompts) > 500
    before = (directory / "prompts.jsonl").stat().st_mtime_ns
    write_assets(tmp_path / "world", seed=5)
    assert (directory / "prompts.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.sft.batch_sze=1", "sft.batch_size"),
        ("--seed=1", "--config.seed=1"),
        ("--zzzzz=1", "no such flag"),
    ],
)
def test_a_wrong_flag_is_told_without_a_traceback(argument, words, capsys):
    assert quickstart.main([argument]) == 2
    assert words in capsys.readouterr().err

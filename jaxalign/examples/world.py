"""A synthetic task with a known gold preference, made from a seed: what the quickstart aligns a model to.

In this world a thing's colour depends on the season, and the facts are drawn once from a fixed seed.  A prompt
names a season and some things; a response states their colours.  The people who wrote the demonstrations were
careless: a colour is right only `RIGHT` of the time, and else it is the thing's colour in the other season.  The gold
preference is for the response with more right colours.  Which response that is cannot be read off any token's
frequency or off the length: over the seasons each thing is equally often of each of its colours, so that only the
season, the thing and the colour together tell right from wrong.

>>> scene = Scene("Mara", "winter", ("door", "lake"))
>>> scene.prompt
'Mara writes in winter of the door and the lake.'
>>> gold_reward(scene.prompt, f" The door is {FACTS['winter', 'door']} and the lake is {FACTS['winter', 'lake']}.")
1.0
>>> gold_reward(scene.prompt, f" The door is {FACTS['summer', 'door']} and the lake is {FACTS['winter', 'lake']}.")
0.0
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

NAMES = ("Mara", "Tobin", "Ilse", "Rafi", "Nadia", "Oskar", "Petra", "Yusuf", "Lena", "Hugo", "Anya", "Bram")
SEASONS = ("winter", "summer")
THINGS = ("door", "lake", "owl", "lamp", "boat", "scarf", "clock", "tower", "field", "bridge")
COLOURS = ("green", "blue", "red", "white", "brown", "silver", "yellow", "purple")
RIGHT = 0.5  # share of stated colours that are right in a careless response
ASKED = 4  # things in a prompt


def _facts() -> dict[tuple[str, str], str]:
    """(season, thing) -> colour: two different colours for each thing."""
    rng = random.Random("the facts of the world")
    pairs = [rng.sample(COLOURS, len(SEASONS)) for _ in THINGS]
    return {
        (season, thing): pair[i] for thing, pair in zip(THINGS, pairs, strict=True) for i, season in enumerate(SEASONS)
    }


FACTS = _facts()
_PROMPT = re.compile(r"writes in (\w+) of (.*)\.")
_THING = re.compile(r"\bthe (\w+)")
_STATED = re.compile(r"\bthe (\w+) is (\w+)", re.IGNORECASE)


class Scene(NamedTuple):
    """What a prompt tells and asks."""

    name: str
    season: str
    asked: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The scene as a prompt."""
        return f"{self.name} writes in {self.season} of {_listed([f'the {thing}' for thing in self.asked])}."


def _listed(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def draw_scene(rng: random.Random) -> Scene:
    """A random scene that asks about `ASKED` things."""
    return Scene(rng.choice(NAMES), rng.choice(SEASONS), tuple(rng.sample(THINGS, ASKED)))


def respond(scene: Scene, rng: random.Random, right: float = RIGHT) -> str:
    """A response that states each asked colour, correctly with probability `right`, else as in the other season."""
    stated = []
    for thing in scene.asked:
        season = scene.season
        if rng.random() >= right:
            season = next(s for s in SEASONS if s != scene.season)
        stated.append(f"the {thing} is {FACTS[season, thing]}")
    sentence = _listed(stated)
    return f" {sentence[0].upper()}{sentence[1:]}."


def gold_reward(prompt: str, completion: str) -> float:
    """How well a completion agrees with the world, from -1 to 1.

    The first statement about each asked thing counts, and a thing of which nothing is said counts as wrong, as does
    a statement about another thing: (right - wrong) / (right + wrong).

    Raises:
      ValueError: the prompt is not one of this world's.
    """
    match = _PROMPT.search(prompt)
    if match is None:
        raise ValueError(f"not a prompt of this world: {prompt!r}")
    season, asked = match[1], _THING.findall(match[2])
    stated: dict[str, str] = {}
    for thing, colour in _STATED.findall(completion):
        stated.setdefault(thing, colour)
    right = sum(stated.get(thing) == FACTS[season, thing] for thing in asked)
    total = len(set(asked) | set(stated))
    return (2 * right - total) / total


def demonstrations(count: int, seed: int) -> list[dict[str, str]]:
    """Careless demonstrations, as `prompt` and `completion`."""
    rng = random.Random(f"demonstrations {seed}")
    scenes = (draw_scene(rng) for _ in range(count))
    return [{"prompt": scene.prompt, "completion": respond(scene, rng)} for scene in scenes]


def preferences(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of careless responses to one prompt, ordered by the gold preference; equals are drawn again."""
    rng = random.Random(f"preferences {seed}")
    pairs: list[dict[str, str]] = []
    while len(pairs) < count:
        scene = draw_scene(rng)
        a, b = respond(scene, rng), respond(scene, rng)
        gold_a, gold_b = gold_reward(scene.prompt, a), gold_reward(scene.prompt, b)
        if gold_a != gold_b:
            chosen, rejected = (a, b) if gold_a > gold_b else (b, a)
            pairs.append({"prompt": scene.prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts alone."""
    rng = random.Random(f"prompts {seed}")
    return [{"prompt": draw_scene(rng).prompt} for _ in range(count)]


def gold(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The gold reward as a reward function: `--reward jaxalign.examples.world:gold`."""
    return [gold_reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

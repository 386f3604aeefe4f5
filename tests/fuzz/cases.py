"""All cases of the campaign, the same for the same seed."""

from __future__ import annotations

import random

from tests.fuzz import (
    cases_commands,
    cases_config,
    cases_configfile,
    cases_data,
    cases_datafiles,
    cases_faults,
    cases_machines,
    cases_models,
    cases_numbers,
    cases_plan,
    cases_rewards,
    cases_signals,
    cases_tokenizers,
)
from tests.fuzz.case import Case

MODULES = (
    cases_config,
    cases_configfile,
    cases_data,
    cases_datafiles,
    cases_models,
    cases_tokenizers,
    cases_rewards,
    cases_commands,
    cases_plan,
    cases_machines,
    cases_numbers,
    cases_faults,
    cases_signals,
)


def all_cases(seed: int = 0) -> list[Case]:
    """The cases in order.

    Raises:
      ValueError: two have one title.
    """
    cases = [case for module in MODULES for case in module.cases(random.Random(f"{module.__name__} {seed}"))]
    seen: set[str] = set()
    for case in cases:
        if case.title in seen or not case.title.isprintable():
            raise ValueError(f"a case's title {case.title!r} is there twice, or cannot be printed")
        seen.add(case.title)
    return cases


def sample(cases: list[Case], count: int, seed: int = 0) -> list[Case]:
    """Some of the cases: as many of each group, as far as there are."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    each = -(-count // len(groups))
    rng = random.Random(f"sample {seed}")
    return [case for group in groups.values() for case in rng.sample(group, min(each, len(group)))]

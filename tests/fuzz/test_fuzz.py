"""A sample of the fuzz campaign, and the rules by which it judges. The whole: `python -m tests.fuzz`."""

import pytest

from tests.fuzz.case import (
    DIED,
    HANG,
    OK,
    OVERZEALOUS,
    REFUSED,
    RUNS,
    SILENT,
    SOUND,
    TRACEBACK,
    UNCLEAR,
    WARNS,
    WRONG,
    Case,
    Outcome,
    judge,
)
from tests.fuzz.cases import all_cases, sample
from tests.fuzz.pool import run_all

SLOW = ("damage", "change", "disk", "signals", "rewards")  # those train; tests/train has its own
REFUSAL = "jaxalign train: the input cannot be used\nfound:    seed is -1\nexpected: 0\nfix:      --config.seed=0\n"


def test_a_sample_of_bad_inputs_is_refused_with_words():
    quick = [case for case in all_cases() if case.expect == REFUSED and case.group not in SLOW]
    cases = sample(quick, 110)  # what is refused is refused in moments; what runs must compile
    wrong = []

    def told(case, outcome):
        verdict, why = judge(case, outcome)
        if verdict != OK:
            wrong.append(f"python -m tests.fuzz --show '{case.title}'   # {verdict}: {why}")

    run_all(cases, seed=0, workers=1, told=told)
    assert wrong == [], "\n" + "\n".join(wrong)


def test_the_campaign_is_the_same_for_the_same_seed():
    one, other = ([(c.title, c.expect, c.words) for c in all_cases(seed)] for seed in (0, 0))
    assert one == other and len(one) > 1000
    assert [c.title for c in all_cases(1)] != [title for title, *_ in one]


@pytest.mark.parametrize(
    ("expect", "outcome", "verdict"),
    [
        (REFUSED, Outcome(2, REFUSAL, 0.1), OK),
        (REFUSED, Outcome(0, "done", 0.1), SILENT),
        (REFUSED, Outcome(2, "error", 0.1), UNCLEAR),
        (REFUSED, Outcome(2, REFUSAL.replace("seed", "seat"), 0.1), UNCLEAR),  # the field is not named
        (REFUSED, Outcome(2, REFUSAL.replace("-1", "-1" * 5000), 0.1), UNCLEAR),  # a dump
        (REFUSED, Outcome(1, REFUSAL, 0.1), UNCLEAR),
        (REFUSED, Outcome(None, "Traceback (most recent call last):\nValueError: x", 0.1), TRACEBACK),
        (REFUSED, Outcome(2, "Traceback (most recent call last):\n" + REFUSAL, 0.1), TRACEBACK),
        (SOUND, Outcome(None, "", 60.0, "hang"), HANG),
        (SOUND, Outcome(None, "", 60.0, "died"), DIED),
        (SOUND, Outcome(0, "done", 0.1), OK),
        (SOUND, Outcome(2, REFUSAL, 0.1), OK),
        (SOUND, Outcome(0, "done", 0.1, "", "not finite: x"), SILENT),
        (SOUND, Outcome(0, "done", 0.1, "", "other weights"), WRONG),
        (RUNS, Outcome(2, REFUSAL, 0.1), OVERZEALOUS),
        (WARNS, Outcome(0, "warning: seed", 0.1), OK),
        (WARNS, Outcome(0, "done", 0.1), SILENT),
    ],
)
def test_verdicts(expect, outcome, verdict):
    case = Case("config", "seed", lambda place: [], expect, ("seed",))
    assert judge(case, outcome)[0] == verdict

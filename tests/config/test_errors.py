"""An error is a structure: what it is about is added on the way out, and its text is made where it is shown."""

import pickle

import pytest

from jaxalign.errors import InputError, named


def error() -> InputError:
    return InputError("no directory x", "a model", "--config.model.path=DIR, or --config.data.sources=FILE")


def test_places_and_fields_are_told_from_the_outside_in():
    found = error().within("record 3").within("stage dpo", lambda field: f"dpo.{field}")
    assert found.places == ("stage dpo", "record 3") and found.problem == "no directory x"
    assert found.found == "stage dpo: record 3: no directory x"
    assert found.fields == ("dpo.model.path", "dpo.data.sources")
    assert found.fix == "--config.dpo.model.path=DIR, or --config.dpo.data.sources=FILE"


def test_the_text_is_made_where_it_is_shown():
    shown = error().render({"model.path": "--model", "data.sources": "--data"}.get)
    assert shown.splitlines()[-1] == "fix:      --model=DIR, or --data=FILE"
    assert "--config.model.path=DIR" in str(error())


def test_a_field_is_named_once_and_other_fields_keep_their_names():
    with pytest.raises(InputError) as raised, named("rewards.model"), named("rewards.model"):
        raise error()
    assert raised.value.places == ("rewards.model",) and raised.value.fields == ("rewards.model", "data.sources")


def test_it_travels_between_processes():
    there = pickle.loads(pickle.dumps(error().within("stage dpo")))
    assert (there.found, there.fix) == ("stage dpo: no directory x", error().fix)

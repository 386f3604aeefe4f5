"""Records that the tests of machines that are not there train on."""

import json

import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file that serves all four algorithms."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ("a", "small", "red", "fox", "ran", "to", "the", "big", "green", "tree", "and", "sat", "down")
    with open(path, "w") as file:
        for i in range(64):
            record = {
                "prompt": " ".join(words[: 2 + i % 5]),
                "chosen": " " + " ".join(words[i % 3 :]),
                "rejected": " " + " ".join(words[: 4 + i % 4]),
            }
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def completions(pairs):
    """The chosen halves, for SFT."""
    path = pairs.with_name("completions.jsonl")
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in records))
    return path

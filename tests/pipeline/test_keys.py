"""What counts in the key of a stage: the content of files, functions by their source."""

import pytest

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.pipeline import keys


def test_reward_functions_count_by_their_source(tmp_path):
    function = tmp_path / "mine.py"
    function.write_text("def f(): return 1\n")
    config = defaults("ppo")
    config.rewards.function = f"{function}:f"
    before = keys.keys_of(config, {}, ()).key
    assert before == keys.keys_of(config, {}, ()).key
    function.write_text("def f(): return 2\n")
    assert keys.keys_of(config, {}, ()).key != before
    assert keys.module_file("json.decoder:JSONDecoder").endswith("decoder.py")
    assert keys.module_file("nowhere.at.all:f") == "nowhere.at.all:f"


def test_paths_of_every_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text("1")
    sources = ("gs://bucket/x", {"path": "org/name"}, str(tmp_path / "*.jsonl"))
    assert keys.paths_in(sources) == ["gs://bucket/x", "org/name", str(tmp_path / "*.jsonl")]
    assert keys.file_digest("gs://bucket/x") is None and keys.file_digest("org/name") is None
    assert keys.file_digest("{% for m in messages %}" * 1000) is None
    before = keys.file_digest(sources[2])
    (tmp_path / "b.jsonl").write_text("2")
    assert keys.file_digest(sources[2]) != before is not None


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("1")
    monkeypatch.setattr(keys.Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no", "a.jsonl")))
    config = defaults("sft")
    config.data.sources = (str(tmp_path / "a.jsonl"),)
    with pytest.raises(InputError, match=r"data.sources: a.jsonl: no"):
        keys.keys_of(config, {}, ())


def test_large_files_count_by_size_time_and_ends(tmp_path):
    big = tmp_path / "big.bin"
    with big.open("wb") as file:
        file.truncate((64 << 20) + 10)
    before = keys.file_digest(str(big))
    assert before == keys.file_digest(str(big))
    with big.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert keys.file_digest(str(big)) != before


@pytest.mark.parametrize("typed,meant", [("daat", "data"), ("bata", "algorithm.beta")])
def test_letters_in_another_order_are_the_commands_own_flag(typed, meant):
    from jaxalign.pipeline.named import named_config

    with pytest.raises(InputError) as error:
        named_config("dpo", ["--model=m", f"--{typed}=x"])
    assert meant in error.value.fix

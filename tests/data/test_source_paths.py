"""What a source's path may be: files, globs, directories, URLs, saved sets, repositories, hub ids."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from ml_collections import ConfigDict

from jaxalign.data.mixture import load_records
from jaxalign.data.source import Source, config_line, parse_sources
from jaxalign.data.sources import read
from jaxalign.errors import InputError
from jaxalign.registry import COMPLETIONS


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts(source):
    (source,) = parse_sources(source)
    return [raw.row["text"] for raw in read(source)]


def fails(source):
    with pytest.raises(InputError) as error:
        texts(source)
    return error.value


def test_file_glob_and_home(tmp_path, monkeypatch):
    write(tmp_path / "b.jsonl", "b")
    write(tmp_path / "a.jsonl", "a", "a2")
    write(tmp_path / "odd[1].jsonl", "odd")
    assert texts(str(tmp_path / "a.jsonl")) == ["a", "a2"]
    assert texts(tmp_path / "b.jsonl") == ["b"]
    assert texts(f"{tmp_path}/?.jsonl") == ["a", "a2", "b"]
    assert texts(str(tmp_path / "odd[1].jsonl")) == ["odd"], "a file's own name comes before a glob"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/a.jsonl") == ["a", "a2"]


def test_directory_reads_data_files_in_order(tmp_path):
    write(tmp_path / "part-2.jsonl", "2")
    write(tmp_path / "deep" / "part-1.jsonl", "1")
    write(tmp_path / ".hidden" / "x.jsonl", "hidden")
    (tmp_path / "LICENSE").write_text("x")
    (tmp_path / "README.md").write_text("# no front matter")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert texts(str(tmp_path)) == ["1", "2"]


def test_directory_with_splits(tmp_path):
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", "t1")
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", "t0")
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", "e")
    write(tmp_path / "contest.jsonl", "none")
    assert texts(str(tmp_path)) == ["t0", "t1"], "train is the default; splits are never mixed"
    assert texts({"path": str(tmp_path), "split": "test"}) == ["e"]
    error = fails({"path": str(tmp_path), "split": "tain"})
    assert "no split 'tain'" in error.found and "test, train" in error.expected and '"split": "train"' in error.fix


def test_split_by_folder_and_by_other_names(tmp_path):
    write(tmp_path / "dev" / "a.jsonl", "v")
    write(tmp_path / "test" / "a.jsonl", "e")
    assert texts({"path": str(tmp_path), "split": "validation"}) == ["v"]
    assert texts({"path": str(tmp_path), "split": "dev"}) == ["v"]
    error = fails(str(tmp_path))
    assert "none of them train" in error.found and '"split": "validation"' in error.fix


def test_one_split_alone_is_read_but_not_beside_files_of_none(tmp_path):
    write(tmp_path / "test.jsonl", "e")
    assert texts(str(tmp_path)) == ["e"]
    write(tmp_path / "more.jsonl", "m")
    error = fails(str(tmp_path))
    assert "test.jsonl beside more.jsonl" in error.found and '"split": "test"' in error.fix


def test_options_without_effect_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "a")
    assert "split 'train' of files named one by one" in fails({"path": path, "split": "train"}).found
    assert "name 'x' of local files" in fails({"path": path, "name": "x"}).found
    assert "revision 'x' of local files" in fails({"path": str(tmp_path), "revision": "x"}).found


def test_wrong_path_offers_the_nearest(tmp_path):
    write(tmp_path / "preferences.jsonl", "a")
    error = fails(f"{tmp_path}/preferecnes.jsonl")
    assert error.found == f"{tmp_path}/preferecnes.jsonl: no such file"
    assert "preferences.jsonl" in error.expected
    assert error.fix == f'data.sources=({{"path": "{tmp_path}/preferences.jsonl"}},)'
    assert "the glob matches nothing" in fails(f"{tmp_path}/*.csv").found
    assert "no such file" in fails(f"{tmp_path}/no/such/folder/x.jsonl").found
    (tmp_path / "empty").mkdir()
    assert "no data files in it" in fails(f"{tmp_path}/empty").found


def test_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/train.jsonl", b'{"text": "t"}\n')
    memory.pipe("/set/test.jsonl", b'{"text": "e"}\n')
    assert texts("memory://set/train.jsonl") == ["t"]
    assert texts("memory://set/t*.jsonl") == ["e", "t"]
    assert texts("memory://set") == ["t"]
    assert texts({"path": "memory://set", "split": "test"}) == ["e"]
    assert texts(f"file://{write(tmp_path / 'a.jsonl', 'a')}") == ["a"]
    assert "nothing there" in fails("memory://set/other.jsonl").found
    assert "nope://a.jsonl" in fails("nope://a.jsonl").found


def test_hub_id_reaches_load_dataset_as_given(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        rows = {"train": [{"text": "t"}], "test": [{"text": "e"}]}
        loaded = datasets.DatasetDict({name: datasets.Dataset.from_list(row) for name, row in rows.items()})
        return loaded["train"] if "split" in options else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("owner/set") == ["t"]
    assert texts({"path": "owner/set", "split": "test", "name": "main", "revision": "v1"}) == ["e"]
    assert texts({"path": "owner/set", "split": "train[:10]"}) == ["t"]
    assert texts({"path": "Anthropic/hh-rlhf", "name": "helpful-base"}) == ["t"]
    assert calls == [
        ("owner/set", {"revision": None}),
        ("owner/set", {"revision": "v1", "name": "main"}),
        ("owner/set", {"revision": None, "split": "train[:10]"}),
        ("Anthropic/hh-rlhf", {"revision": None, "data_dir": "helpful-base"}),
    ]
    (raw,) = read(Source("owner/set", split="test"))
    assert raw.where == "owner/set[test]:1"
    assert '"split": "train"' in fails({"path": "owner/set", "split": "trian"}).fix


def test_a_streamed_set_is_read_no_further_than_needed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    given = []

    def rows():
        for i in range(1000):
            if i == 900:
                raise ConnectionError("reset by peer")
            given.append(i)
            yield {"text": f"t{i}"}

    def load_dataset(path, **options):
        assert path == "owner/set" and options == {"revision": None, "streaming": True}
        return datasets.IterableDatasetDict(train=datasets.IterableDataset.from_generator(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records, tally = load_records({"path": "owner/set", "streaming": True}, COMPLETIONS, max_records=300)
    assert len(records) == tally.read == 300 and given == list(range(300))
    part = {"path": "owner/set", "streaming": True, "split": "train[5:8]"}
    assert texts(part) == ["t5", "t6", "t7"] and len(given) == 308
    (raw, *_) = read(Source("owner/set", split="train[5:8]", streaming=True))
    assert raw.where == "owner/set[train[5:8]]:1"
    error = fails({"path": "owner/set", "streaming": True})
    assert (
        "owner/set[train]:901" in error.found and "reset by peer" in error.found and "no such file" not in error.found
    )
    assert '"split": "train[:1000]"' in fails({**part, "split": "train[:5%]"}).fix
    assert '"split": "train"' in fails({**part, "split": "trian[:5]"}).fix
    assert "streaming" in fails({**part, "streaming": "yes"}).found
    assert "local files" in fails({"path": write(tmp_path / "a.jsonl", "a"), "streaming": True}).found


def test_a_row_that_cannot_be_decoded_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "image": [None, {"bytes": b"no image", "path": None}]})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    error = fails(str(tmp_path / "saved"))
    assert f"{tmp_path / 'saved'}:2: " in error.found and "no such" not in error.found and "that record" in error.fix


def test_a_repository_on_disk_may_be_streamed(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    write(tmp_path / "a.jsonl", *"abc")
    whole, streamed = (load_records({"path": str(tmp_path), "streaming": on}, COMPLETIONS)[0] for on in (False, True))
    assert list(whole) == list(streamed) and len(whole) == 3


def test_unreachable_hub_id_says_both_ways(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write(Path("my-pairs.jsonl"), "a")
    error = fails("my-pair")  # offline: see conftest.py
    assert "my-pair: no such file or folder, and as a hub id it did not load" in error.found
    assert error.fix == 'data.sources=({"path": "my-pairs.jsonl"},)'


def test_saved_sets_and_repositories(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train, test = (datasets.Dataset.from_list([{"text": text}]) for text in ("t", "e"))
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    assert texts(str(tmp_path / "one")) == ["t"]
    assert texts(str(tmp_path / "both")) == ["t"]
    assert texts({"path": str(tmp_path / "both"), "split": "test"}) == ["e"]

    write(tmp_path / "repo" / "x" / "a.jsonl", "of x")
    write(tmp_path / "repo" / "y" / "a.jsonl", "of y")
    configs = "".join(f"- config_name: {c}\n  data_files: {c}/a.jsonl\n" for c in "xy")
    (tmp_path / "repo" / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n# Set\n")
    assert texts({"path": str(tmp_path / "repo"), "name": "y"}) == ["of y"]
    assert "Config name is missing" in fails(str(tmp_path / "repo")).found


def test_sources_may_be_configs():
    config = ConfigDict({"sources": ()})
    config.sources = ("a.jsonl", ConfigDict({"path": "b", "columns": {"prompt": "q"}}))
    a, b = parse_sources(config.sources)
    assert a == Source("a.jsonl") and b == Source("b", columns={"prompt": "q"})
    assert parse_sources("a.jsonl") == [Source("a.jsonl")]
    assert config_line(b, weight=2.0, split="é") == (
        'data.sources=({"path": "b", "split": "é", "weight": 2.0, "columns": {"prompt": "q"}},)'
    )


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ((), "data.sources is empty"),
        (3, "data.sources is 3"),
        ((3,), "data.sources holds 3"),
        (({},), "a source whose path is None"),
        (({"path": ""},), "a source whose path is ''"),
        ((" ",), "a source whose path is ' '"),
        (({"path": "a", "colums": {}},), "a source with 'colums'"),
        (({"path": "a", "weight": 0},), "a: weight 0"),
        (({"path": "a", "weight": float("nan")},), "a: weight nan"),
        (({"path": "a", "weight": True},), "a: weight True"),
        (({"path": "a", "columns": ["prompt"]},), "a: columns ['prompt']"),
        (({"path": "a", "columns": {"prompt": 1}},), "a: columns {'prompt': 1}"),
        (({"path": "a", "split": 1},), "a source whose split is 1"),
    ],
)
def test_wrong_sources(sources, found):
    with pytest.raises(InputError) as error:
        parse_sources(sources)
    assert error.value.found == found
    if "colums" in found:
        assert '"columns"' in error.value.fix


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import jaxalign.data.mixture\n"
        "print([m for m in ('jax', 'datasets', 'pyarrow', 'transformers', 'torch', 'fsspec') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_saved_set_whose_texts_are_elsewhere_is_told(tmp_path):
    import datasets
    import numpy as np

    datasets.Dataset.from_dict({"text": ["a" * 111, "b" * 111]}).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    ends = np.array([[0, 111, 222], [0, 111, 1 << 30]], np.int32)  # far behind the file
    assert file.read_bytes().count(ends[0].tobytes()) == 1
    file.write_bytes(file.read_bytes().replace(ends[0].tobytes(), ends[1].tobytes()))
    assert "ArrowInvalid" in fails(str(tmp_path / "saved")).found

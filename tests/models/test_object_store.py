"""Models at URLs: written whole or not taken for a model, fetched once, and read by every reader of a directory."""

import fsspec
import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from jaxalign.config import defaults, stages
from jaxalign.errors import InputError
from jaxalign.models import export, hf, store
from jaxalign.models.hub import locate
from jaxalign.models.tokenizer import load_tokenizer, stop_ids
from jaxalign.pipeline import stages as pipeline
from jaxalign.rewards.load import load_scorer
from jaxalign.train.rundir import RunDir
from tests.models import tiny_models as tiny

URL = "s3://bucket/run/sft/export"


class Bucket(MemoryFileSystem):
    """An object store in memory, whose paths start with a bucket's name."""

    protocol = ("s3",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    """What lies at `s3://` and `memory://`; the cache of fetched models is a new one."""
    forget = backend._FileSystemSpecBackend._get_filesystem.cache_clear
    old = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    forget()
    Bucket.store.clear()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield Bucket.store
    Bucket.store.clear()
    if old is not None:
        fsspec.register_implementation("s3", old, clobber=True)
    forget()


@pytest.fixture
def model(tmp_path):
    config = tiny.hf_config()
    return hf.load(tiny.write(tmp_path / "model", config, tiny.tensors(config)), **tiny.SETTINGS)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def stored(files):
    return sorted(name.rpartition("/")[2] for name in files)


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "home/.cache/jaxalign/models").iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("url", [URL, "memory://models/one/"])
def test_round_trip(tmp_path, monkeypatch, files, model, url):
    monkeypatch.chdir(tmp_path)
    assert hf.save(url, *model, max_bytes=20_000) == url
    assert len([name for name in stored(files) if name.endswith(".safetensors")]) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # no folder named `s3:`
    described, params = hf.load(url, **tiny.SETTINGS)
    assert described == model[0] and same(params, model[1])


def test_fetched_once_for_each_version(tmp_path, files, model):
    hf.save(URL, *model)
    first = locate(URL)
    before = {p.name: p.stat().st_mtime_ns for p in first.iterdir()}
    assert locate(URL + "/") == first
    assert {p.name: p.stat().st_mtime_ns for p in first.iterdir()} == before and cached(tmp_path) == [first.name]
    small = locate(URL, weights=False)
    assert small != first and [p.name for p in small.iterdir()] == ["config.json"]
    changed = jax.tree.map(lambda x: x + 1, model[1])
    hf.save(URL, model[0], changed, max_bytes=20_000)
    assert "model.safetensors" not in stored(files)  # of the export before
    assert locate(URL) != first
    assert same(hf.load(URL, **tiny.SETTINGS)[1], changed)


def test_tokenizer_and_stop_ids(shared, tmp_path, model):
    source = shared / "models" / "stories260k-llama"
    hf.save(URL, *model, source=source)
    tokenizer = load_tokenizer(URL)
    assert tokenizer.get_vocab() == load_tokenizer(source).get_vocab()
    assert stop_ids(URL, tokenizer) == stop_ids(hf.save(tmp_path / "local", *model, source=source), tokenizer)
    hf.save("s3://bucket/two", *model, source=URL)
    assert load_tokenizer("s3://bucket/two").get_vocab() == tokenizer.get_vocab()


def test_a_reward_model_at_a_url_is_no_function(files):
    with pytest.raises(InputError, match="no model at s3://bucket/reward"):
        load_scorer("s3://bucket/reward", dtype="float32")


def test_nothing_there():
    for url in ("s3://bucket/nothing", "memory://nothing"):
        for read in (locate, load_tokenizer, lambda u: hf.load(u, **tiny.SETTINGS)):
            with pytest.raises(InputError, match=f"no model at {url}"):
                read(url)


def test_a_store_that_cannot_be_opened():
    with pytest.raises(InputError, match="no-such-scheme"):
        locate("no-such-scheme://bucket/model")


@pytest.mark.parametrize("overwrites", [False, True])
def test_trap_part_of_an_upload_is_no_model_and_can_be_overwritten(monkeypatch, files, model, overwrites):
    """Whichever write is the last one before a crash, over an earlier export or not."""
    put = MemoryFileSystem.put_file
    hf.save("s3://bucket/whole", *model, max_bytes=30_000)
    for writes in range(len(stored(files))):
        Bucket.store.clear()
        if overwrites:
            hf.save(URL, *model)
        left = [writes]

        def crash(self, *args, left=left, **kwargs):
            if not left[0]:
                raise ConnectionError("lost")
            left[0] -= 1
            return put(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "put_file", crash)
        with pytest.raises(InputError, match="lost"):
            hf.save(URL, *model, max_bytes=30_000)
        monkeypatch.setattr(MemoryFileSystem, "put_file", put)
        assert "config.json" not in stored(files)
        with pytest.raises(InputError, match=r"no config\.json|no model at"):
            locate(URL)
        with pytest.raises(InputError, match=r"no config\.json|no model at"):
            locate(URL, weights=False)
        hf.save(URL, *model, max_bytes=30_000)
        assert same(hf.load(URL, **tiny.SETTINGS)[1], model[1])


def test_a_model_that_changes_while_it_is_fetched(monkeypatch, tmp_path, files, model):
    hf.save(URL, *model)
    get = MemoryFileSystem.get

    def changing(self, *args, **kwargs):
        get(self, *args, **kwargs)
        self.pipe_file("/bucket/run/sft/export/config.json", b"{}")

    monkeypatch.setattr(MemoryFileSystem, "get", changing)
    with pytest.raises(InputError, match="changed while it was read"):
        locate(URL)
    assert cached(tmp_path) == []


def test_what_others_wrote_is_kept(files, model, tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/run/sft/export/notes.txt", b"mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        hf.save(URL, *model)
    store.upload(tmp_path / "model", "s3://bucket/two")
    config = tmp_path / "model" / "model.safetensors"
    fs.pipe_file("/bucket/two/model.safetensors", config.read_bytes().replace(b"jaxalign", b"somebody"))
    with pytest.raises(InputError, match="not written by jaxalign"):
        export.check_target("s3://bucket/two")


def test_two_stages_in_an_object_store(shared, tmp_path, monkeypatch, files):
    """The second starts from the first one's export; the same command again keeps both.

    Checkpoints are left out: they are Orbax's, whose files go to stores through TensorStore's own drivers.
    """
    import jaxalign.train.trainer as trainer

    monkeypatch.chdir(tmp_path)
    source = shared / "models" / "stories260k-llama"
    seen = []

    def train(checked, dry_run=False):
        config = checked.config
        seen.append(config.model.path)
        model, params = hf.load(config.model.path, **tiny.SETTINGS)
        params = jax.tree.map(lambda x: x + 1, params)
        if dry_run:
            return {}
        run = RunDir(config.workdir)
        run.write_json("config.json", {})
        target = hf.save(str(run.export), model, params, source=config.model.path)
        run.write_json("DONE", {"steps": 1})
        return {"export": target}

    monkeypatch.setattr(trainer, "run", train)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    first, second = defaults("sft"), defaults("sft")
    first.data.sources = second.data.sources = (str(data),)
    first.model.path = str(source)
    second["from"].model = "first"
    config = stages("s3://bucket/run", first=first, second=second)

    pipeline.run(config, dry_run=True, log=lambda line: None)
    assert seen == [str(source), str(source)] and not files
    results = pipeline.run(config, log=lambda line: None)
    assert seen[2:] == [str(source), "s3://bucket/run/first/export"]
    assert results["second"]["export"] == "s3://bucket/run/second/export"
    embedding = [hf.load(p, **tiny.SETTINGS)[1]["norm"]["scale"] for p in (source, results["second"]["export"])]
    np.testing.assert_array_equal(embedding[0] + 1 + 1, embedding[1])
    assert all(r["skipped"] for r in pipeline.run(config, log=lambda line: None).values())
    pipeline.run(config, dry_run=True, log=lambda line: None)
    assert seen[-1] == "s3://bucket/run/first/export"
    with config.unlocked():
        config.second.optimizer.learning_rate = 1.0
    lines = []
    pipeline.run(config, log=lines.append)
    assert any("second.old-1" in line for line in lines) and len(seen) == 7
    assert "/bucket/run/second.old-1/export/config.json" in files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "home"]


def test_a_workdir_that_checkpoints_cannot_go_to(monkeypatch):
    with pytest.raises(InputError, match="workdir memory://run"):
        RunDir("memory://run")

    def missing(name):
        raise ImportError(f"Please install the package for {name}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(InputError, match=r"workdir gs://b/run \(Please install"):
        RunDir("gs://b/run")

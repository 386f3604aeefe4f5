"""The cache of reference log-probs: what names it, and what becomes of a damaged one."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.parallel.mesh import make_mesh
from jaxalign.train import reference
from jaxalign.train.models import Role
from tests.models import tiny_models as tiny


class Tokenizer:
    chat_template = None

    def get_vocab(self):
        return {"a": 0}


@pytest.fixture
def attach(tmp_path, monkeypatch):
    """Attaches log-probs of a model with these fields of `config.json`; the number of passes over the data so far."""
    passes = []

    def compute(dataset, table, cache, logprobs, mesh):
        passes.append(cache.path)
        table = np.full(table.shape, -float(len(passes)), np.float32)
        cache.write(table)
        return table

    monkeypatch.setattr(reference, "_compute", compute)
    params = tiny.model().init(jax.random.key(0))

    def attach(**changes):
        config = defaults("dpo")
        config.data.cache_dir = str(tmp_path)
        role = Role(tiny.model(**changes), lambda wanted: params)
        stage = SimpleNamespace(
            config=config,
            tokenizer=Tokenizer(),
            stop_ids=(2,),
            mesh=make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]),
            program=SimpleNamespace(reference=role),
            directory=SimpleNamespace(cache=epath.Path(tmp_path)),
        )
        dataset = SimpleNamespace(
            fingerprint="data", num_records=3, batches_per_epoch=1, shape=(1, 1), is_whole=lambda index: True
        )
        reference.attach(stage, [dataset, None])
        return len(passes)

    return attach


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"dtype": "bfloat16"},
    ],
    ids=["rope_theta", "rope_scaling", "norm_eps", "dtype"],
)
def test_trap_another_config_on_the_same_weights_is_another_reference(attach, changes):
    assert attach() == 1 and attach() == 1
    assert attach(**changes) == 2


def _torn(data):
    return data[: len(data) // 2]


def _flipped(data):
    at = data.index(np.float32(-1).tobytes())
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("harm", [_torn, _flipped, lambda data: b"", lambda data: b"PK" + data[2:9]])
def test_a_damaged_cache_is_made_again(attach, tmp_path, capsys, harm):
    attach()
    (file,) = tmp_path.glob("reference-*.npz")
    file.write_bytes(harm(file.read_bytes()))
    assert attach() == 2
    assert f"warning: {file} is damaged" in capsys.readouterr().err
    assert attach() == 2 and [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_whole_table_with_a_number_that_is_not_finite_is_not_taken(attach, tmp_path):
    """Written on the way, before the pass that made it has looked at its numbers."""
    attach()
    (file,) = tmp_path.glob("reference-*.npz")
    with np.load(file) as found:
        keys, table = json.loads(str(found["keys"])), found["table"]
    cache = reference.ReferenceCache(epath.Path(tmp_path), keys, len(table))
    assert np.array_equal(cache.read(), table)
    cache.write(np.full_like(table, -np.inf))
    assert attach() == 2


def test_a_cache_of_other_inputs_under_this_name_is_not_taken(attach, tmp_path):
    attach()
    (one,) = tmp_path.glob("reference-*.npz")
    assert attach(rms_norm_eps=1e-3) == 2
    (other,) = set(tmp_path.glob("reference-*.npz")) - {one}
    other.write_bytes(one.read_bytes())
    assert attach(rms_norm_eps=1e-3) == 3


def test_every_byte_of_a_cache_is_watched(tmp_path):
    keys, table = {"model": "one"}, np.array([[-1, -2], [-3, -4]], np.float32)
    cache = reference.ReferenceCache(epath.Path(tmp_path), keys, 2)
    cache.write(table)
    whole = cache.path.read_bytes()
    for at in range(0, len(whole), 7):
        cache.path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        found = cache.read()
        assert np.isnan(found).all() or np.array_equal(found, table)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    cache = reference.ReferenceCache(epath.Path(tmp_path), {"model": "one"}, 1)
    cache.write(np.zeros((1, 2), np.float32))

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        cache.write(np.ones((1, 2), np.float32))
    assert np.array_equal(cache.read(), np.zeros((1, 2))) and len(list(tmp_path.iterdir())) == 1

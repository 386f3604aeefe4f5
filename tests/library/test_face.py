"""`import jaxalign`: what it offers is there, is documented, and comes late."""

import inspect
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign


@pytest.mark.parametrize("name", jaxalign.__all__)
def test_every_name_is_there_and_documented(name):
    found = getattr(jaxalign, name)
    assert name in dir(jaxalign) and callable(found)
    assert inspect.getdoc(found)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="sigmoid_loss"):
        jaxalign.sigmoid_los  # noqa: B018


def test_names_come_late():
    code = (
        "import sys, jaxalign\n"
        "assert not {'jax', 'flax', 'numpy', 'ml_collections'} & set(sys.modules)\n"
        "jaxalign.defaults('dpo')\n"
        "assert 'jax' not in sys.modules\n"
        "import jaxalign.train.metrics\n"  # which takes the name of the function
        "assert callable(jaxalign.train) and jaxalign.train.metrics.headline\n"
        "from jaxalign import gae, train, sigmoid_loss\n"
        "assert callable(train)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dpo_by_the_face():
    pair = {"chosen": jnp.array([1.0]), "rejected": jnp.array([0.0])}
    zero = {"chosen": jnp.zeros(1), "rejected": jnp.zeros(1)}
    terms = jaxalign.sigmoid_loss(pair, zero, zero, jnp.array([True]), beta=1.0)
    np.testing.assert_allclose(terms.loss, np.log1p(np.exp(-1.0)), rtol=1e-6)


def test_load_save_and_generate(shared, tmp_path, monkeypatch):
    import jaxalign.pipeline.loaded as loaded

    make_mesh = loaded.make_mesh
    monkeypatch.setattr(loaded, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1]))
    path = shared / "models" / "stories260k-llama"
    model, params = jaxalign.load(path)
    assert isinstance(model, jaxalign.Model)
    where = jaxalign.save(tmp_path / "out", model, params, source=path)
    texts = jaxalign.generate(str(where), ["Once upon a time", "The dog"], max_new_tokens=8, temperature=0)
    assert len(texts) == 2 and all(texts)


def test_train_by_a_tree_and_by_a_file(tmp_path, monkeypatch):
    import jaxalign.library as library

    seen = []
    monkeypatch.setattr(library, "run", lambda config, dry_run: seen.append((config, dry_run)) or {"steps": 1})
    config = jaxalign.defaults("dpo")
    assert jaxalign.train(config, dry_run=True) == {"steps": 1}
    (tmp_path / "c.json").write_text(json.dumps({"algorithm": {"name": "dpo", "beta": 0.3}}))
    jaxalign.train(tmp_path / "c.json")
    assert seen[0] == (config, True) and seen[1][0].algorithm.beta == 0.3

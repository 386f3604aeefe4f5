"""Some layers trained: the export of several stacks is one model for transformers, with these layers otherwise."""

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxalign.models import hf
from jaxalign.ops.logits import logits
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import Rows

IDS = np.random.default_rng(0).integers(3, 400, (2, 9))


def test_transformers_loads_whole_layers_again(shared, tmp_path):
    source = shared / "models" / "stories260k-llama"
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    model, params = hf.load(
        source,
        dtype="float32",
        param_dtype="float32",
        remat="none",
        cuts=(1, 2, 4),
        shardings=lambda tree: param_shardings(mesh, tree),
    )
    rng = np.random.default_rng(1)
    for name in ("1-1", "4-4"):
        move = lambda x: x * np.asarray(1 + 0.3 * rng.standard_normal(x.shape), np.float32)  # noqa: E731
        params["layers"][name] = jax.tree.map(move, params["layers"][name])
    hf.save(tmp_path / "export", model, params, source=source)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    moved = {name for name, x in theirs.state_dict().items() if not torch.equal(x, before[name])}
    wanted = {name for name in before if name.startswith(("model.layers.1.", "model.layers.4."))}
    assert moved == wanted and len(wanted) == 18
    places = np.arange(9)[None].repeat(2, 0).astype(np.int32)
    rows = Rows(IDS.astype(np.int32), places, 0 * places, places + 1)
    hidden = model.apply(params, rows)[0]
    with torch.no_grad():
        found = theirs(torch.as_tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits(hidden, model.head(params)), found, rtol=0, atol=1e-4)

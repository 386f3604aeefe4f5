"""Loss and gradient of every algorithm on eight virtual devices are those on one, whatever the mesh."""

import jax
import pytest

from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import unsplit
from tests.steps.worlds import ALGORITHMS, assert_same, data, fresh, result

# (data, fsdp, tensor), micro-batches, rematerialisation
MESHES = {
    "data": ((8, 1, 1), 1, "none"),
    "fsdp": ((1, 8, 1), 1, "none"),
    "tensor": ((1, 1, 8), 1, "none"),
    "mixed": ((2, 2, 2), 2, "dots"),  # with everything else that a run of a large model uses
}


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_devices_change_nothing(algorithm, axes, x64):
    sizes, accum, remat = MESHES[axes]
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    assert not unsplit(mesh, fresh(algorithm).params)  # every rule of the table is at work
    with jax.set_mesh(mesh):
        found = result(algorithm, data(algorithm), accum=accum, remat=remat, mesh=mesh)
    assert_same(found, algorithm)

"""Checkpoints that are damaged or hold no numbers, and the best of several."""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_world import World, objective

from jaxalign.errors import InputError
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.steps.step import make_train_step
from jaxalign.train.checkpoints import checksums
from jaxalign.train.compiled import Compiled
from jaxalign.train.quantised_moments import pack


def saved(world):
    return sorted(p.name for p in world.directory.checkpoints.iterdir())


def files(folder):
    """The files that hold a checkpoint's arrays."""
    state = Path(os.fspath(folder)) / "state"
    return sorted(p for p in state.rglob("*") if p.parent.name == "d")


def each(do):
    return lambda folder: [do(path) for path in files(folder)]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edited(name, change):
    def edit(folder):
        path = Path(os.fspath(folder)) / name
        path.write_text(change(path.read_text()))

    return edit


DAMAGES = {
    "array files cut": each(cut),
    "array files emptied": each(lambda path: path.write_bytes(b"")),
    "array files deleted": each(lambda path: path.unlink()),
    "manifest deleted": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "description emptied": edited("state/_METADATA", lambda text: ""),
    "meta cut": edited("meta/metadata", lambda text: text[:20]),
    "meta changed": edited("meta/metadata", lambda text: text.replace('"step": 4', '"step": 5')),
    "all of it deleted": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four steps with two checkpoints."""
    world = World(tmp_path_factory.mktemp("run"), num_steps=4, checkpoint__every=2, checkpoint__keep=2)
    world.run()
    return world


def copy_of(run, folder, **fields):
    shutil.copytree(run.directory.path, folder)
    return World(folder, num_steps=6, checkpoint__every=2, checkpoint__keep=2, **fields)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_whole_one_and_taken_nowhere(run, tmp_path, damage):
    world = copy_of(run, tmp_path / "run")
    DAMAGES[damage](world.directory.checkpoints / "4")
    with pytest.raises(InputError) as error:
        world.run()
    assert "checkpoint 4" in error.value.found and "damaged" in error.value.found
    assert "the newest is 2" in error.value.expected
    assert "--config.checkpoint.resume=whole" in error.value.fix
    assert saved(world) == ["2", "4"]


def test_every_flipped_bit_of_an_array_is_found_or_harms_nothing(run, tmp_path):
    good = copy_of(run, tmp_path / "good")
    expected = float(good.run()[0].params["policy"]["norm"]["scale"][0])
    sizes = [path.stat().st_size for path in files(run.directory.checkpoints / "4")]
    places = [(i, place) for i, size in enumerate(sizes) for place in range(5, size, size // 4)]
    found = 0
    for number, (i, place) in enumerate(places):
        world = copy_of(run, tmp_path / str(number))
        world.step = good.step
        path = files(world.directory.checkpoints / "4")[i]
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)
        try:
            state, _ = world.run()
        except InputError as error:
            assert "damaged" in error.found
            found += 1
        else:
            assert float(state.params["policy"]["norm"]["scale"][0]) == expected
    assert found


def test_the_whole_one_is_taken_where_the_user_says_so(run, tmp_path, capsys):
    good, world = copy_of(run, tmp_path / "good"), copy_of(run, tmp_path / "run", checkpoint__resume="whole")
    DAMAGES["array files cut"](world.directory.checkpoints / "4")
    state, _ = world.run()
    err = capsys.readouterr().err
    assert "warning: checkpoint 4 is damaged" in err and "resuming from step 2" in err
    expected, _ = good.run()
    assert (state.params["policy"]["norm"]["scale"] == expected.params["policy"]["norm"]["scale"]).all()
    assert saved(world) == ["4", "6", "damaged-4"]  # written anew, and what was damaged is kept
    again, _ = world.run()
    assert int(again.data_cursor) == 6 and saved(world) == ["4", "6", "damaged-4"]


def test_without_a_whole_one_nothing_is_begun_anew_in_its_place(run, tmp_path):
    world = copy_of(run, tmp_path / "run", checkpoint__resume="whole")
    for step in ("2", "4"):
        DAMAGES["array files cut"](world.directory.checkpoints / step)
    with pytest.raises(InputError) as error:
        world.run()
    assert "checkpoint 4" in error.value.found and "2 too" in error.value.found
    assert "there is no other" in error.value.expected and "workdir=ANOTHER" in error.value.fix
    assert saved(world) == ["2", "4"]


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(run, tmp_path, capsys, monkeypatch):
    from jaxalign.train import checkpoints

    read = checkpoints.read_meta
    old = {"checksums", "digest"}
    monkeypatch.setattr(
        checkpoints, "read_meta", lambda folder: {k: v for k, v in read(folder).items() if k not in old}
    )
    world = copy_of(run, tmp_path / "run")
    assert int(world.run()[0].data_cursor) == 6
    assert "checkpoint 4 has no checksums" in capsys.readouterr().err


def spoiled(world, at, value=jnp.inf):
    """The world with an update that spoils the parameters, and a loss that does not show it."""
    step = make_train_step(objective, {"policy": world.tx})

    def train_step(state, frozen, batch):
        new, metrics = step(state, frozen, batch)
        wrong = new.data_cursor + 1 == at
        return new._replace(params=jax.tree.map(lambda x: jnp.where(wrong, value, x), new.params)), metrics

    world.step = Compiled(train_step, "train step", donate=(0,), out_shardings=world.places)
    return world


def test_a_run_that_ends_in_numbers_that_are_not_finite_is_not_done(tmp_path):
    asked = []
    world = World(tmp_path, num_steps=4, checkpoint__every=2, evaluate=lambda state: asked.append(1) or {"loss": 1.0})
    with pytest.raises(InputError) as error:
        spoiled(world, at=4).run()
    assert "after step 4" in error.value.found and "not finite" in error.value.found
    assert "params/policy/norm/scale" in error.value.found
    assert "the last checkpoint is 2" in error.value.expected and "learning_rate" in error.value.fix
    assert saved(world) == ["2"] and not asked


def test_a_stopped_run_saves_no_such_state_either(tmp_path):
    world = World(tmp_path, num_steps=4, checkpoint__every=3)
    with pytest.raises(InputError, match="there is no checkpoint yet"):
        spoiled(world, at=3, value=jnp.nan).run()
    assert saved(world) == []


def test_a_saved_state_that_is_not_finite_is_not_gone_on_from(run, tmp_path, monkeypatch):
    from jaxalign.train import checkpoints

    world = World(tmp_path, num_steps=4, checkpoint__every=2, checkpoint__keep=2)
    with monkeypatch.context() as patch:  # as earlier versions saved it
        patch.setattr(checkpoints, "_not_finite", lambda sums: "")
        spoiled(world, at=4).run()
    world.num_steps = 6
    with pytest.raises(InputError, match="not finite") as error:
        world.run()
    assert "the newest is 2" in error.value.expected


def test_checksums_see_every_bit_and_no_mesh():
    rng = np.random.default_rng(0)
    kernel = {"layers": {"mlp": {"down": {"kernel": rng.normal(size=(2, 8, 4)).astype(np.float32)}}}}
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    one, many = checksums(jax.device_put(kernel)), checksums(jax.device_put(kernel, param_shardings(mesh, kernel)))
    (name,) = one
    assert name == "layers/mlp/down/kernel" and (one[name] == many[name]).all()
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_, jnp.int32):
        x = jnp.asarray(rng.integers(0, 2, (3, 5)), dtype)
        other = x.at[1, 2].set(~x[1, 2] if dtype == jnp.bool_ else x[1, 2] + 1)
        assert (checksums({"x": x})["x"] != checksums({"x": other})["x"])[:2].any()
    x = jnp.array([1.0, jnp.nan, jnp.inf, 2.0])
    assert checksums({"x": x})["x"][2] == 2


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_moments_of_8_bits_that_are_no_numbers_are_counted(moment):
    """Their codes are integers: what is not finite shows in a block's scale alone."""
    state = optax.scale_by_adam().init({"kernel": jnp.ones((4, 64))})
    moments = getattr(state, moment)["kernel"]
    for value in (jnp.nan, jnp.inf):
        spoilt = state._replace(**{moment: {"kernel": moments.at[1, 2].set(value).at[3, 40].set(value)}})
        found = checksums({"train": {"opt_state": pack(spoilt, 0)}})
        wrong = {name: int(sums[2]) for name, sums in found.items() if sums[2]}
        assert wrong == {f"train/opt_state/moments/{moment}/kernel": 2}
    assert not any(sums[2] for sums in checksums({"opt_state": pack(state, 0)}).values())


def test_checksums_of_eight_bytes(x64):
    x = jnp.arange(6.0, dtype=jnp.float64).reshape(2, 3)
    nearly = x.at[1, 1].set(np.nextafter(4.0, 5.0))
    assert (checksums({"x": x})["x"] != checksums({"x": nearly})["x"])[:2].any()
    assert (checksums({"x": x})["x"] != checksums({"x": -x})["x"])[:2].any()


def test_evaluations_save_where_the_best_is_to_be_kept(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 4.0])
    world = World(
        tmp_path,
        num_steps=7,
        evaluate=lambda state: {"loss": next(losses)},
        eval__every=2,
        checkpoint__every=0,
        checkpoint__best_metric="loss",
    )
    world.run()
    assert saved(world) == ["4", "7"]  # the best and the last


def test_an_evaluation_without_the_metric_or_with_nan_is_never_the_best(tmp_path):
    rows = iter([{"loss": 1.0}, {"loss": 3.0, "x": 2.0}, {"loss": 2.0, "x": float("nan")}])
    world = World(tmp_path, num_steps=6, evaluate=lambda state: next(rows), eval__every=2, checkpoint__best_metric="x")
    world.run()
    assert saved(world) == ["4", "6"]
    world.num_steps, world.evaluate = 8, lambda state: {"loss": 5.0}
    world.config.checkpoint.best_metric = "eval/loss"  # another choice later on
    world.run()
    assert saved(world) == ["6", "8"]

"""How long a run's sequences may be, what its models' paths are called in messages, and what no model is."""

import json
import os

import pytest

from jaxalign.config import defaults
from jaxalign.errors import InputError
from jaxalign.models.hub import locate
from jaxalign.ops.precision import require_dtypes
from jaxalign.parallel.mesh import make_mesh
from jaxalign.train.models import Roles, fit_length
from jaxalign.train.stage import more_stops
from tests.models import tiny_models as tiny
from tests.models.tiny_families import CASES


@pytest.fixture
def model(tmp_path):
    """A directory whose config.json says for how many tokens a model was made."""

    def make(name, positions, **more):
        (tmp_path / name).mkdir()
        file = tiny.hf_config(max_position_embeddings=positions, **more)
        (tmp_path / name / "config.json").write_text(json.dumps(file))
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    "positions,asked,effective,told",
    [(512, None, 512, 0), (4096, None, 1024, 0), (512, 600, 600, 1), (512, 256, 256, 0)],
)
def test_the_default_of_max_length_is_what_the_model_was_made_for(model, positions, asked, effective, told):
    c = defaults("dpo")
    c.model.path, c.data.max_length = model("m", positions), asked
    fitted, said = fit_length(c.lock())
    assert fitted.data.max_length == effective and c.data.max_length == asked and fitted.is_locked
    assert len(said) == told and all("512" in line for line in said)


def test_the_least_of_all_models_that_read_a_sequence_counts(model):
    c = defaults("ppo")
    c.model.path, c.rewards.model, c.algorithm.value_path = model("m", 900), model("r", 300), model("v", 500)
    assert fit_length(c)[0].data.max_length == 300
    c.data.max_length = 400
    (said,) = fit_length(c)[1]
    assert c.rewards.model in said


NTK = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("asked, length", [(None, 300), (700, 700)])
def test_every_model_of_a_run_turns_by_its_longest_sequence(model, asked, length):
    c = defaults("ppo")
    c.model.path, c.rewards.model = (model(name, 300, rope_parameters=NTK) for name in "mr")
    c.model.rope_length = asked
    c, told = fit_length(c)
    assert not told
    roles = Roles(c, make_mesh({"data": 8}))
    for role in (roles.policy(1e-6), roles.reference(), roles.scorer(c.model.path, 1e-6)):
        assert role.model.config.rope.length == length
        assert role.model.for_length(10_000) is role.model


def test_a_rope_length_that_cannot_be_or_says_nothing(model):
    c = defaults("sft")
    c.model.path, c.model.rope_length = model("m", 300), 200
    with pytest.raises(InputError, match=r"model\.rope_length is 200, data\.max_length 300"):
        fit_length(c)
    c.model.rope_length = 900
    (said,) = fit_length(c)[1]
    assert "rope_length has no effect" in said and "default" in said


def test_a_table_of_positions_is_a_limit(tmp_path):
    """Longer sequences are refused before anything is loaded, not read past the table's end."""
    (tmp_path / "config.json").write_text(json.dumps(CASES["gpt2"]))
    c = defaults("sft")
    c.model.path = str(tmp_path)
    assert fit_length(c)[0].data.max_length == 40
    c.data.max_length = 41
    with pytest.raises(InputError, match="a table of 40 positions") as error:
        fit_length(c)
    assert error.value.fix == "--config.data.max_length=40"


@pytest.mark.parametrize(
    "algorithm,field", [("dpo", "algorithm.reference_path"), ("ppo", "rewards.model"), ("ppo", "algorithm.value_path")]
)
def test_a_path_that_leads_nowhere_is_told_by_its_own_field(model, tmp_path, algorithm, field):
    c = defaults(algorithm)
    c.model.path = model("m", 512)
    c.update_from_flattened_dict({field: str(tmp_path / "nowhere")})
    roles = Roles(c, make_mesh({"data": 8}))
    for use in (lambda: fit_length(c), lambda: roles.scorer(str(tmp_path / "nowhere"))):
        with pytest.raises(InputError) as error:
            use()
        assert error.value.found.startswith(f"{field}: ") and error.value.fix == f"--config.{field}=DIR"


def test_a_runs_directory_is_no_model(model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"format": 1, "config": {}}))
    with pytest.raises(InputError, match="not exported its model yet"):
        locate(run)
    model("run/export", 8)
    with pytest.raises(InputError, match="a run's directory") as error:
        locate(run)
    assert error.value.fix == f"--config.model.path={run}/export"
    stages = tmp_path / "stages"
    for age, name in enumerate(("dpo", "sft", "sft.old-1")):
        (stages / name / "export").mkdir(parents=True)
        (stages / name / "export" / "config.json").write_text("{}")
        os.utime(stages / name / "export" / "config.json", (1e9 - age, 1e9 - age))
    with pytest.raises(InputError, match=r"sft/export or .*dpo/export") as error:
        locate(stages)
    assert error.value.fix.endswith("dpo/export") and "old" not in error.value.expected
    assert locate(run / "export") == run / "export"


def test_float64_needs_64_bits():
    require_dtypes(dtype="bfloat16", frozen_dtype=None)
    with pytest.raises(InputError, match=r"model\.param_dtype is float64") as error:
        require_dtypes(dtype="float32", param_dtype="float64")
    assert "JAX_ENABLE_X64=1" in error.value.fix


def test_float64_with_64_bits(x64):
    assert require_dtypes(dtype="float64") is None  # it is not refused


def test_a_stop_token_beyond_the_vocabulary():
    assert more_stops((3,), range(10)) == (3,)
    with pytest.raises(InputError, match="the id 10"):
        more_stops((10,), range(10))

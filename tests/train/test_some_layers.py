"""Runs that train some layers: what is held, what checkpoints have, what exports are, and patterns that are refused."""

import json

import jax
import numpy as np
import pytest
from run_child import make_config, stories
from stage_world import stage_of, state_of, tensors

from jaxalign.errors import InputError
from jaxalign.models import hf, stacks
from jaxalign.ops.trees import by_path
from jaxalign.parallel.device_memory import num_bytes
from jaxalign.pipeline.export import export
from jaxalign.train import trainer
from jaxalign.train.arguments import step_arguments
from jaxalign.train.models import bytes_by_role

FIELDS = {
    "num_train_steps": 2,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
    "model.train": ("layers[-2:]",),  # of five
}
LAST = (3, 4)


def made(shared, workdir, algorithm, devices=1, **fields):
    return stage_of(make_config(stories(shared, workdir, algorithm, **FIELDS | fields)), devices)


def changed(shared, directory):
    """The tensors that an export has otherwise than the model that was started from."""
    before, after = tensors(shared / "models" / "stories260k-llama"), tensors(directory)
    return {name for name, x in before.items() if name in after and not np.array_equal(x, after[name])}


def of_layers(shared, numbers, part=""):
    names = tensors(shared / "models" / "stories260k-llama")
    return {name for name in names if any(name.startswith(f"model.layers.{i}.{part}") for i in numbers)}


@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("sft", {"grad_accum_steps": 2, "model.remat": "dots"}),
        ("sft", {"optimizer.name": "muon"}),
        ("dpo", {"optimizer.name": "adafactor"}),
        ("dpo", {"algorithm.reference": "cached"}),
        ("reward", {}),
        ("ppo", {}),
    ],
)
def test_a_run(algorithm, more, shared, tmp_path):
    config = make_config(stories(shared, tmp_path / "run", algorithm, **FIELDS | more))
    results = trainer.run(config, devices=jax.devices()[:2])
    assert results["num_compiles"] == 1
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if algorithm == "dpo" and not more.get("algorithm.reference"):
        assert figures[0]["rewards/margins"] == 0.0 and figures[1]["rewards/margins"] != 0.0
    if algorithm == "ppo":
        assert figures[0]["objective/kl"] == 0.0

    # Whole layers again, in their order, of which two are others; so has an export of the checkpoint.
    assert changed(shared, tmp_path / "run" / "export") == of_layers(shared, LAST)
    hf.load(tmp_path / "run" / "export", dtype="float32", param_dtype="float32", remat="none")
    again = tensors(export(str(tmp_path / "run"), str(tmp_path / "again")))
    for name, x in tensors(tmp_path / "run" / "export").items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)

    # Roles share what is frozen; moments and checkpoints are those of two layers, and of a scalar head.
    stage = made(shared, tmp_path / "run", algorithm, 2, **more)
    roles = stage.program.trained
    part = {name: num_bytes(role.abstract()) for name, role in roles.items()}
    for role in roles.values():
        assert {p.split("/")[1] for p in by_path(role.abstract()) if not p.startswith("score")} == {"3-4"}
        assert num_bytes(role.rest.abstract()) + num_bytes(role.abstract()) == num_bytes(role.model.abstract())
    sizes = results["model_bytes"]
    if "optimizer.name" not in more:
        assert results["optimizer_bytes"] < 2.1 * sum(part.values())
    name = stage.program.exported
    whole = num_bytes(roles[name].model.abstract())
    shares = {"dpo": part[name] if "algorithm.reference" not in more else 0, "ppo": part[name]}.get(algorithm, 0)
    assert sum(sizes.values()) == whole + shares + part.get("value", 0)
    state, frozen, _ = step_arguments(stage)
    assert bytes_by_role(state.params, frozen) == sizes
    assert by_path(state_of(stage, 2).params[name]).keys() == by_path(roles[name].abstract()).keys()


def test_the_compiled_step_takes_frozen_layers_once(shared, tmp_path):
    stage = made(shared, tmp_path / "run", "sft")
    state, frozen, batch = step_arguments(stage)
    memory = stage.step.compile(state, frozen, batch).memory_analysis()
    role = stage.program.trained["policy"]
    part, whole = num_bytes(role.abstract()), num_bytes(role.model.abstract())
    # Two layers and two moments of each, the rest of the model, and a batch.
    wanted = 3 * part + (whole - part)
    rest = memory.argument_size_in_bytes - wanted
    assert 0 <= rest < 4096 + num_bytes(batch) and part > 4096 + num_bytes(batch)
    assert memory.output_size_in_bytes < 3 * part + 65536


def test_one_device_and_eight_learn_the_same(shared, tmp_path):
    found = []
    for devices in (1, 8):
        with jax.enable_x64(True):
            fields = {"batch_size": 8, "model.dtype": "float64", "model.param_dtype": "float64"}
            config = make_config(stories(shared, tmp_path / str(devices), "dpo", **FIELDS | fields))
            trainer.run(config, devices=jax.devices()[:devices])
            stage = made(shared, tmp_path / str(devices), "dpo", devices, **fields)
            found.append(by_path(jax.device_get(state_of(stage, 2).params["policy"])))
    for path, one in found[0].items():
        np.testing.assert_allclose(found[1][path], one, rtol=0, atol=1e-9, err_msg=path)


def test_a_run_that_was_cut_resumes_to_the_same_bits(shared, tmp_path):
    constant = FIELDS | {"optimizer.schedule": "constant"}
    trainer.run(make_config(stories(shared, tmp_path / "whole", "sft", **constant)), devices=jax.devices()[:1])
    for steps in (1, 2):
        fields = constant | {"num_train_steps": steps}
        trainer.run(make_config(stories(shared, tmp_path / "cut", "sft", **fields)), devices=jax.devices()[:1])
    one, other = (tensors(tmp_path / name / "export") for name in ("whole", "cut"))
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)


def test_trained_layers_keep_their_precision_beside_frozen_ones_of_less(shared, tmp_path):
    more = {"model.frozen_dtype": "bfloat16", "model.train": ("layers.1.mlp",)}
    trainer.run(make_config(stories(shared, tmp_path / "run", "sft", **FIELDS | more)), devices=jax.devices()[:1])
    stage = made(shared, tmp_path / "run", "sft", **more)
    learned = by_path(state_of(stage, 2).params["policy"])["layers/1-1/mlp/up/kernel"]
    found = tensors(tmp_path / "run" / "export")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found, np.asarray(learned[0]).T)


def test_it_learns_what_full_training_learns_of_these_layers(shared, tmp_path):
    """A step of plain descent: the chosen layers move as they do where all are trained, the others stay."""
    plain = {"optimizer.name": "sgd", "optimizer.b1": 0.0, "optimizer.max_grad_norm": 0.0, "num_train_steps": 1}
    found = {}
    for name, patterns in (("some", (r"layers.(1|3).*", "layers.4.mlp")), ("all", ())):
        fields = FIELDS | plain | {"model.train": patterns, "optimizer.learning_rate": 0.1}
        trainer.run(make_config(stories(shared, tmp_path / name, "sft", **fields)), devices=jax.devices()[:1])
        found[name] = tensors(tmp_path / name / "export")
    named = of_layers(shared, (1, 3)) | of_layers(shared, (4,), "mlp.")
    assert changed(shared, tmp_path / "some" / "export") == named
    for name in named:
        np.testing.assert_allclose(found["some"][name], found["all"][name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "patterns, backward",
    [
        ((), 2.0),  # gradients of all kernels, and of what goes on to the layer below
        (("layers[2:4]",), 0.4 + 0.6),  # of two layers of five; down to layer 2
        (("layers[-1:]", "norm"), 0.2 + 0.2),
        (("layers[-1:]", "embed"), 0.2 + 1.0),  # down to the embedding
        (("norm",), 0.0),
    ],
)
def test_work_of_the_backward_pass(patterns, backward, shared, tmp_path):
    program = made(shared, tmp_path / "run", "sft", **{"model.train": patterns}).program
    assert program.backward == pytest.approx(backward) and program.passes == program.forward + program.backward


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (("layers[-1:]",), {"layers/4-4"}),
        (("layers[1:3]", "lm_head|embed"), {"layers/1-2", "embed"}),
        (("layers[-2].mlp",), {"layers/3-3"}),
        (("layers.1.*",), {"layers/1-1"}),
        (("layers/(0|4)/attention",), {"layers/0-0", "layers/4-4"}),
        ((r"model\.layers\.2\.self_attn\.q_proj",), {"layers/2-2"}),
        (("layers[1:-3]",), {"layers/1-1"}),
        (("layers[0:5]",), {"layers"}),
        (("layers/mlp/down",), {"layers"}),
        (("down_proj",), {"layers"}),
    ],
)
def test_patterns(patterns, expected, shared, tmp_path):
    role = made(shared, tmp_path / "run", "sft", **{"model.train": patterns}).program.trained["policy"]
    found = set()
    for path in by_path(role.abstract()):
        first, second = path.split("/")[:2]
        found.add(f"{first}/{second}" if stacks.place(path).stop else first)
    assert found == expected


@pytest.mark.parametrize(
    "pattern, said, fix",
    [
        ("layers[-6:]", r"names layers\[-6:\] of 5 layers, which goes beyond them", "layers[-2:]"),
        ("layers[5]", r"names layers\[5\] of 5 layers", "layers[-2:]"),
        ("layers[3:2]", r"of 5 layers, which holds no layer", "layers[-2:]"),
        ("layers.(3|5).*", "names layer 5 of a model of 5 layers", "layers.4"),
        ("layers[-:]", "matches no parameter", "model.train="),
        ("embed[5:-]", "matches no parameter", "model.train="),
        ("lm_head", "whose head is its embedding", "--config.model.train=embed"),
        ("layers.3.mpl", r"'layers\.3\.mpl' matches no parameter", "model.layers.3.mlp"),
        ("layers[-2:", "unterminated character set", "lm_head"),
    ],
)
def test_patterns_that_are_refused(pattern, said, fix, shared, tmp_path):
    with pytest.raises(InputError, match=said) as caught:
        made(shared, tmp_path / "run", "sft", **{"model.train": (pattern,)})
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "more, said",
    [
        ({"adapter.rank": 4}, "some layers and not others, beside an adapter"),
        (
            {"model.frozen_dtype": "int8", "model.train": ("layers/3/mlp_norm",)},
            r"which model\.frozen_dtype=int8 keeps",
        ),
    ],
)
def test_what_some_layers_do_not_go_with(more, said, shared, tmp_path):
    with pytest.raises(InputError, match=said):
        made(shared, tmp_path / "run", "dpo", **more)

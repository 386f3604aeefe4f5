import pytest

from jaxalign.config import defaults, stages
from jaxalign.errors import InputError
from jaxalign.pipeline.configfile import load_config, override


@pytest.fixture
def file(tmp_path):
    def write(body, name="c.py"):
        path = tmp_path / name
        path.write_text("from jaxalign.config import defaults, stages\n" + body)
        return str(path)

    return write


@pytest.mark.parametrize(
    "field,text,expected",
    [
        ("optimizer.learning_rate", "5e-7", 5e-7),
        ("optimizer.learning_rate", "1", 1.0),
        ("batch_size", "128", 128),
        ("num_train_steps", "1e5", 100_000),
        ("num_train_steps", "1_000", 1000),
        ("mesh.fsdp", "-1", -1),
        ("data.packing", "true", True),
        ("data.packing", "False", False),
        ("data.packing", None, True),
        ("model.path", "org/model", "org/model"),
        ("model.path", "None", None),
        ("from.model", "sft", "sft"),
        ("model.dtype", "None", "None"),  # not a field that may be empty: validate refuses it
        ("data.sources", "a.jsonl", ("a.jsonl",)),
        ("data.sources", "Anthropic/hh-rlhf", ("Anthropic/hh-rlhf",)),
        ("data.sources", "1-2.jsonl", ("1-2.jsonl",)),
        ("data.sources", "a.jsonl, b.jsonl", ("a.jsonl", "b.jsonl")),
        ("data.sources", "('a,b.jsonl',)", ("a,b.jsonl",)),
        ("data.sources", "('a', 'b')", ("a", "b")),
        ("data.sources", "{'path': 'a', 'weight': 2}", ({"path": "a", "weight": 2},)),
        (
            "data.sources",
            '[{"path": "a", "columns": {"text": "x"}, "shuffle": true}]',
            ({"path": "a", "columns": {"text": "x"}, "shuffle": True},),
        ),
        ("data.sources", "()", ()),
        ("data.sources", "ünï/模型.jsonl", ("ünï/模型.jsonl",)),
        ("data.sources", "", ()),
        ("rollout.stop", "2,</s>", ("2", "</s>")),
        ("rollout.stop", "(2, '</s>')", (2, "</s>")),
    ],
)
def test_override_by_type(field, text, expected):
    config = defaults("dpo")
    override(config, field, text)
    value = config
    for key in field.split("."):
        value = value[key]
    assert value == expected
    assert type(value) is type(expected)


def test_none_empties_a_field_that_the_config_filled():
    config = defaults("ppo")
    config.rewards.function = "f.py:f"
    override(config, "rewards.function", "None")
    assert config.rewards.function is None


def test_a_section_keeps_the_fields_that_are_not_named():
    config = defaults("dpo")
    override(config, "mesh", "{'data': 2, 'fsdp': 4}")
    assert config.mesh.to_dict() == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(InputError, match=r"mesh\.dataa"):
        override(config, "mesh", "{'dataa': 2}")


@pytest.mark.parametrize(
    "field,near",
    [
        ("optimizer.learnin_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("beta", "algorithm.beta"),
        ("batchsize", "batch_size"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
    ],
)
def test_a_misspelt_field_is_offered_the_nearest_name(field, near):
    with pytest.raises(InputError) as error:
        override(defaults("dpo"), field, "1")
    assert error.value.fix == f"--config.{near}=..."


@pytest.mark.parametrize(
    "field,text",
    [
        ("batch_size", "many"), ("batch_size", "1.5"), ("batch_size", ""), ("batch_size", None), ("batch_size", "inf"),
        ("optimizer.learning_rate", "fast"), ("optimizer.learning_rate", "None"),
        ("data.packing", "maybe"), ("data.sources", "(a.jsonl, b.jsonl)"), ("mesh", "2"), ("mesh", None),
    ],
)  # fmt: skip
def test_text_of_the_wrong_type(field, text):
    with pytest.raises(InputError, match=field):
        override(defaults("dpo"), field, text)


def test_load_applies_overrides_in_order_and_locks(file):
    path = file('def get_config():\n    c = defaults("dpo")\n    c.data.sources = ("old.jsonl",)\n    return c\n')
    config = load_config(path, [("seed", "1"), ("data.sources", "a"), ("seed", "2"), ("data.sources", "b")])
    assert config.seed == 2
    assert config.data.sources == ("a", "b")  # the flag repeated adds; the file's own value is replaced
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.batchsize = 1


def test_load_with_an_argument(file):
    path = file("def get_config(name):\n    return defaults(name)\n")
    assert load_config(path + ":ppo").algorithm.name == "ppo"


def test_sections_of_stages(file):
    path = file('def get_config():\n    return stages("w", sft=defaults("sft"), dpo=defaults("dpo"))\n')
    config = load_config(path, [("dpo.algorithm.beta", "0.3"), ("dpo.from.model", "sft"), ("stages", "sft,dpo")])
    assert config.dpo.algorithm.beta == 0.3
    assert config.dpo["from"].model == "sft"
    assert config.stages == ("sft", "dpo")


def test_errors_in_the_file_name_its_line(file):
    for body, words in [
        ("x = 1\n", "no get_config"),
        ("def get_config():\n    return {}\n", "returns dict"),
        ('def get_config():\n    c = defaults("dpo")\n    c.batchsize = 3\n    return c\n', "c.py:4: AttributeError"),
        ("def get_config(:\n", "c.py:2: SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "c.py:3: ZeroDivisionError"),
        ("import nowhere_to_be_found\n", "c.py:2: ModuleNotFoundError"),
        ('def get_config():\n    return defaults("doo")\n', "algorithm 'doo'"),
    ]:
        with pytest.raises(InputError) as error:
            load_config(file(body))
        assert words in str(error.value), body


def test_a_missing_file_is_offered_the_nearest(tmp_path, file):
    file("", "stories.py")
    with pytest.raises(InputError) as error:
        load_config(str(tmp_path / "storys.py"))
    assert error.value.fix.endswith("stories.py")


def test_overriding_one_stage_leaves_the_other():
    config = stages("w", a=defaults("dpo"), b=defaults("dpo"))
    override(config, "a.model.path", "x")
    assert config.b.model.path is None

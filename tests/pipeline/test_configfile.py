import os
import sys

import pytest

from jaxalign.config import defaults, stages
from jaxalign.errors import InputError
from jaxalign.pipeline.configfile import load_config, run_script, split_overrides
from jaxalign.pipeline.overrides import override
from jaxalign.pipeline.stages import plan


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
        ("checkpoint.resume", "whole", "whole"),
        ("checkpoint.resume", "false", False),
        ("checkpoint.resume", None, True),
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
    assert error.value.fix == f"--config.{near}=1"


@pytest.mark.parametrize(
    "field,text",
    [
        ("batch_size", "many"), ("batch_size", "1.5"), ("batch_size", ""), ("batch_size", None), ("batch_size", "inf"),
        ("optimizer.learning_rate", "fast"), ("optimizer.learning_rate", "None"),
        ("data.packing", "maybe"), ("data.sources", "(a.jsonl, b.jsonl)"), ("mesh", "2"), ("mesh", None),
        ("data.sources", ""), ("data.eval_sources", " "), ("rollout.stop", ","),
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
        (
            'def get_config():\n    c = defaults("dpo")\n    c.batchsize = 3\n    return c\n',
            "c.py:4: there is no field",
        ),
        ("def get_config(:\n", "c.py:2: SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "c.py:3: ZeroDivisionError"),
        ("import nowhere_to_be_found\n", "c.py:2: ModuleNotFoundError"),
        ('def get_config():\n    return defaults("doo")\n', "algorithm 'doo'"),
    ]:
        with pytest.raises(InputError) as error:
            load_config(file(body))
        assert words in str(error.value), body


@pytest.mark.parametrize(
    ("line", "found", "expected", "fix"),
    [
        ("c.algorithm.betta = 3", "no field algorithm.betta", "the nearest name is algorithm.beta", "algorithm.beta"),
        ("c.learning_rate = 3", "no field learning_rate", "is optimizer.learning_rate", "optimizer.learning_rate"),
        ('c["betta"] = 3', "there is no field betta", "the nearest name is algorithm.beta", "algorithm.beta"),
        ("print(c.algorithm.betta)", "there is no field algorithm.betta", "algorithm.beta", "algorithm.beta"),
        ("c.algorithm.kl_coef = 3", "there is no field algorithm.kl_coef for dpo", "is a field of ppo", "without it"),
        ('c.data.sources = "p.jsonl"', "is 'p.jsonl', of type str", "a tuple", 'data.sources = ("p.jsonl",)'),
        ("c.batch_size = 2.0", "batch_size is 2.0, of type float", "a value of type int", "batch_size = 2"),
        ('c.optimizer.learning_rate = "1e-4"', "is '1e-4', of type str", "of type float", "learning_rate = 0.0001"),
        ('c.optimizer.learning_rate = "low"', "is 'low', of type str", "of type float", "learning_rate = 1e-06"),
    ],
)  # fmt: skip
def test_mistakes_about_fields_in_the_file(file, monkeypatch, tmp_path, line, found, expected, fix):
    file(f'def get_config():\n    c = defaults("dpo")\n    {line}\n    return c\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_config("c.py")  # relative, as it is typed
    assert error.value.found.startswith("c.py:4: ") and found in error.value.found
    assert expected in error.value.expected
    assert error.value.fix.replace("'", '"').startswith("line 4 of c.py: ") and fix in error.value.fix.replace("'", '"')


def test_a_file_may_import_its_neighbour(file, tmp_path):
    file('def get_config():\n    return defaults("dpo")\n', "neighbour.py")
    path = file("from neighbour import get_config\n")
    before = list(sys.path)
    assert load_config(path).algorithm.name == "dpo"
    assert sys.path == before and "neighbour" not in sys.modules
    with pytest.raises(InputError, match=r"c\.py:2: ModuleNotFoundError: No module named 'neighbours'\n"):
        load_config(file("from neighbours import get_config\n"))


def test_an_argument_that_the_file_does_not_take(file):
    path = file('def get_config():\n    return defaults("dpo")\n')
    with pytest.raises(InputError, match="takes no argument") as error:
        load_config(f"{path}:abc")
    assert error.value.fix == f"--config={path}"
    path = file("def get_config(name):\n    return defaults(name)\n")
    with pytest.raises(InputError, match="wants an argument") as error:
        load_config(path)
    assert error.value.fix == f"--config={path}:ARGUMENT"


def test_a_field_of_another_algorithm():
    with pytest.raises(InputError, match="no such field for sft") as error:
        override(defaults("sft"), "algorithm.beta", "1")
    assert error.value.expected == "algorithm.beta is a field of dpo"
    assert error.value.fix == "without --config.algorithm.beta, or a config of defaults('dpo')"
    config = stages("w", sft=defaults("sft"), dpo=defaults("dpo"))
    with pytest.raises(InputError, match="no such field for sft"):
        override(config, "sft.algorithm.beta", "1")


def test_a_stages_field_without_the_stage():
    with pytest.raises(InputError) as error:
        override(stages("w", sft=defaults("sft"), dpo=defaults("dpo")), "algorithm.beta", "1")
    assert error.value.expected == "the name of a stage before it: dpo.algorithm.beta"
    assert error.value.fix == "--config.dpo.algorithm.beta=1"


@pytest.mark.parametrize(
    ("field", "text", "fix"), [("optimizer.max_grad_norm", "None", "1.0"), ("batch_size", "many", "64")]
)
def test_the_fields_own_value_is_proposed(field, text, fix):
    with pytest.raises(InputError) as error:
        override(defaults("dpo"), field, text)
    assert error.value.fix == f"--config.{field}={fix}"


def test_a_missing_file_is_offered_the_nearest(tmp_path, file):
    file("def get_config(): ...", "stories.py")
    file("def reward(prompts, completions): ...", "storys_.py")  # no config
    with pytest.raises(InputError) as error:
        load_config(str(tmp_path / "storys.py"))
    assert error.value.fix.endswith("stories.py")


def test_a_pipe_beside_the_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.py")
    with pytest.raises(InputError, match="no file"):
        load_config(str(tmp_path / "config.py"))


def test_a_forgotten_return_is_told(file):
    with pytest.raises(InputError) as error:
        load_config(str(file("def get_config():\n    config = 1\n", "empty.py")))
    assert error.value.fix == "return config"


def test_overriding_one_stage_leaves_the_other():
    config = stages("w", a=defaults("dpo"), b=defaults("dpo"))
    override(config, "a.model.path", "x")
    assert config.b.model.path is None


def test_a_script_tells_its_fields_and_keeps_transformers_quiet(capsys, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    ran = []
    assert run_script("quickstart", ["--help"], ran.append, "configs/quickstart.py") == 0
    assert "the fields are those of configs/quickstart.py" in capsys.readouterr().out and not ran
    assert run_script("quickstart", ["--config.seed=1"], ran.append) == 0
    assert ran == [[("seed", "1")]] and os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "1"


@pytest.mark.parametrize(
    "body,words",
    [
        ("import sys\nsys.exit(0)\n", "c.py:3: the file ends the program"),
        ("def get_config():\n    raise SystemExit\n", "c.py:3: the file ends the program"),
        ("def get_config():\n    open('/no/such/file')\n", "Error: [Errno"),
        ("def get_config():\n    raise KeyError('x')\n", "KeyError: 'x'"),
        ("def get_config():\n    raise GeneratorExit('g')\n", "c.py:3: GeneratorExit: g"),
        ("raise type('Own', (BaseException,), {})('mine')\n", "c.py:2: Own: mine"),
        ("get_config = 3\n", "has no get_config()"),
        ("class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E\n", "c.py:5: E"),
        ("def get_config():\n    return get_config()\n", "RecursionError"),
        (
            "def get_config():\n    c = defaults('sft')\n    c.optimizer.learning_rate = 10**400\n",
            "c.py:4: OverflowError",
        ),
        ("def get_config():\n    return stages('x')\n", "without a stage"),
        ("def get_config():\n    return stages('x', sft=None)\n", "sft is of type NoneType"),
        ("def get_config():\n    return stages('x', sft={'a': 1})\n", "sft is of type dict"),
        ("def get_config():\n    return stages('x', sft=3)\n", "sft is of type int"),
        (
            "def get_config():\n    return stages('x', sft=stages('y', a=defaults('sft')))\n",
            "sft is of type ConfigDict",
        ),
        ("def get_config():\n    return stages('x', stages=defaults('sft'))\n", "'stages'"),
        ("def get_config():\n    return stages(3, sft=defaults('sft'))\n", "workdir"),
    ],
)
def test_whatever_goes_wrong_in_a_file_is_told_in_words(file, body, words):
    with pytest.raises(InputError) as error:
        load_config(file(body))
    assert words in str(error.value)


def test_a_negated_flag_takes_no_value():
    with pytest.raises(InputError, match=r"--noconfig\.data\.shuffle=3"):
        split_overrides(["--noconfig.data.shuffle=3"])


@pytest.mark.parametrize("section", ["model", "data", "algorithm", "checkpoint", "optimizer", "from"])
@pytest.mark.parametrize("value", ["None", "3", "{}"])
def test_a_section_that_is_none_any_more_is_named(file, section, value):
    line = f'    c = defaults("sft")\n    c.unlock()\n    c["{section}"] = {value}\n    return c\n'
    with pytest.raises(InputError, match=section):
        plan(load_config(file(f"def get_config():\n{line}")))

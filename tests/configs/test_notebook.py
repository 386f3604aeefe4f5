"""The notebook runs without a display on what a quickstart leaves, and says what to do where there is none."""

import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import quickstart_results

from jaxalign.errors import InputError
from jaxalign.examples import curves, findings
from jaxalign.examples import quickstart as quickstart_command

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "dpo_vs_rlhf.ipynb"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return quickstart_results.write(tmp_path_factory.mktemp("quickstart"))


def test_the_notebook_runs_and_shows_its_pictures(quickstart, monkeypatch):
    monkeypatch.setenv("QUICKSTART_DIR", str(quickstart))
    monkeypatch.delenv("DISPLAY", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=200, startup_timeout=200, resources=where).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.output_type in ("stream", "error")]
    kinds = [kind for out in outputs for kind in out.data]
    assert kinds.count("image/png") == 5  # each figure once
    assert kinds.count("text/markdown") == 3


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)


def test_missing_results_say_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv("QUICKSTART_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    for ask in (curves.find, lambda: curves.results(tmp_path)):
        with pytest.raises(InputError) as error:
            ask()
        assert error.value.fix.startswith("bash launch/quickstart.sh")


def test_pictures_without_matplotlib_name_the_extra_before_anything_runs(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    monkeypatch.setattr(quickstart_command, "run", lambda config: pytest.fail("trained first"))
    with pytest.raises(InputError) as error:
        quickstart_command._run_and_show([])
    assert "jaxalign[plots]" in error.value.fix


def test_a_quickstart_elsewhere_has_a_world_of_its_own(tmp_path, monkeypatch):
    """Runs of two seeds in two directories must not write over each other's data, not even at the same time."""
    seen = []

    def stop(config):
        seen.append(config)
        raise InputError("a", "b", "c")

    monkeypatch.setattr(quickstart_command, "run", stop)
    monkeypatch.chdir(NOTEBOOK.parents[1])
    for overrides in ([], [("workdir", str(tmp_path)), ("ppo.data.sources", "mine.jsonl")]):
        with pytest.raises(InputError):
            quickstart_command._run_and_show(overrides)
    usual, other = seen
    assert usual.sft.model.path == "runs/quickstart/world/model"
    assert other.sft.model.path == f"{tmp_path}/world/model"
    assert other.dpo.data.sources == (f"{tmp_path}/world/preferences.jsonl",)
    assert other.dpo.data.eval_sources == (f"{tmp_path}/world/preferences_heldout.jsonl",)
    assert other.ppo.data.sources == ("mine.jsonl",)


def test_the_page_of_curves(quickstart):
    assert curves.draw(quickstart).stat().st_size > 20_000


def test_ties_are_drawn_as_neither_right_nor_wrong(tmp_path):
    """DPO's first logged step is taken before any update: TRL's accuracy is 0 there, and no pair is ranked wrongly."""
    found = curves.results(quickstart_results.write(tmp_path))
    found.metrics["dpo"][0] |= {"rewards/accuracies": 0.0, "rewards/ties": 1.0}
    found.metrics["dpo"][1] |= {"rewards/accuracies": 0.5, "rewards/ties": 0.25}
    axis = next(axis for axis in curves.training(found).axes if "DPO: pairs" in axis.get_title())
    assert list(axis.lines[0].get_ydata()[:2]) == [0.5, 0.625]


def test_lines_and_figures_say_what_they_are(tmp_path):
    found = curves.results(quickstart_results.write(tmp_path))
    (axis,) = curves.win_rates(found).axes
    assert "55%: guides call this good" in [text.get_text() for text in axis.texts]
    assert "| peak of the process meanwhile, MiB |" in findings.table(found)


def test_a_run_without_logged_samples_or_kl_is_drawn_too(tmp_path):
    found = curves.results(quickstart_results.write(tmp_path))
    for file in (tmp_path / "ppo" / "samples").iterdir():
        file.unlink()
    (axis, *_) = curves.reward_and_kl(found).axes
    assert axis.get_legend() is None and {text.get_text() for text in axis.texts} == {"SFT", "DPO", "PPO"}
    found.summary["ppo"]["kl"] = None
    curves.reward_and_kl(found).canvas.draw()
    assert "Price" not in findings.findings(found)


@pytest.mark.parametrize(
    ("rate", "low", "high", "word"),
    [
        (0.8, 0.77, 0.83, "clearly above"),
        (0.56, 0.52, 0.6, "clearly better"),
        (0.51, 0.47, 0.55, "not told"),
        (0.3, 0.2, 0.4, "harm"),
    ],
)
def test_verdicts(tmp_path, rate, low, high, word):
    found = curves.results(quickstart_results.write(tmp_path))
    found.summary["dpo"] |= {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
    line = next(x for x in findings.findings(found).splitlines() if "DPO's win rate" in x)
    assert word in line


def test_gold_over_training_is_the_mean_of_what_was_logged(quickstart):
    steps, gold = curves.gold_over_training(quickstart, "ppo")
    assert steps == sorted(steps)
    assert all(-1 <= g <= 1 for g in gold)
    assert gold[-1] > gold[0]

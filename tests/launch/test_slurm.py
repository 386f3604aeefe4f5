"""launch/slurm.sbatch against fake srun, scancel and scontrol: what it calls, and what it does at the time limit."""

import subprocess

import pytest

from tests.launch.conftest import TRAIN, parts


def slurm(checkout, *arguments, **env):
    """The batch script as Slurm runs it: a copy, far from the checkout."""
    spool = checkout.root.parent / "spool"
    spool.mkdir(exist_ok=True)
    copy = spool / "slurm_script"
    copy.write_text((checkout.root / "launch/slurm.sbatch").read_text())
    job = {"SLURM_SUBMIT_DIR": str(checkout.root), "SLURM_JOB_ID": "77"}
    return subprocess.run(
        ["bash", str(copy), *arguments],
        env=checkout.env | job | env, cwd=spool, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_slurm_sets_up_once_then_trains_on_every_task(checkout):
    checkout.fake("srun")
    result = slurm(checkout, *TRAIN)
    assert result.returncode == 0, result.stderr
    setup, train = checkout.calls("srun")
    assert setup["args"] == ["--nodes=1", "--ntasks=1", "bash", "launch/setup.sh"]
    assert train["args"] == [
        "--kill-on-bad-exit=1", "--label", ".venv/bin/python", "-u", "-m", "jaxalign", "train", *TRAIN,
    ]  # fmt: skip
    assert {setup["cwd"], train["cwd"]} == {str(checkout.root)}
    assert train["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


def test_slurm_header_gives_one_task_for_each_node_and_a_signal_to_the_script(checkout):
    lines = (checkout.root / "launch/slurm.sbatch").read_text().splitlines()
    header = [line for line in lines if line.startswith("#SBATCH")]
    assert "#SBATCH --ntasks-per-node=1" in header
    assert "#SBATCH --requeue" in header
    assert any(line.startswith("#SBATCH --signal=B:USR1@") for line in header)
    assert "#SBATCH --open-mode=append" in header  # the log of a requeued job goes on
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command  # sbatch stops there


# An srun whose training goes on until it is told to stop, and ends as jaxalign does; Slurm's signal for the near time
# limit goes to the script. `saving` says what comes of the signal to the tasks.
SRUN = """
import signal, time
if "train" in call["args"]:
    with open(os.environ["RECORD"] + ".task", "w") as file:
        file.write(str(os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ["ENDS"])))
    if "QUICK" in os.environ:
        sys.exit(int(os.environ["ENDS"]))
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(100)
"""
SCANCEL = """
import signal
os.kill(int(open(os.environ["RECORD"] + ".task").read()), signal.SIGTERM)
"""


def slurm_at_its_limit(checkout, **env):
    checkout.fake("srun", SRUN)
    checkout.fake("scancel", SCANCEL)
    checkout.fake("scontrol", "if 'show' in call['args']: print(os.environ.get('JOB', 'PreemptTime=None'))")
    return slurm(checkout, "--config=c.py", "--config.workdir=/shared/run", **env)


def scontrol(checkout):
    return [call["args"] for call in checkout.calls("scontrol") if call["args"][0] != "show"]


def test_slurm_saves_at_its_time_limit_and_goes_back_into_the_queue(checkout):
    result = slurm_at_its_limit(checkout, ENDS="143")
    assert result.returncode == 0, result.stderr
    assert checkout.calls("scancel")[0]["args"] == ["--signal=TERM", "77"]  # the tasks, not this script
    assert scontrol(checkout) == [["requeue", "77"]]
    # Started again, it is the same command in the same workdir, and another round of the queue.
    result = slurm_at_its_limit(checkout, ENDS="143", SLURM_RESTART_COUNT="1")
    first, second = (call["args"] for call in checkout.calls("srun") if "train" in call["args"])
    assert first == second and "--config.workdir=/shared/run" in second
    assert scontrol(checkout) == [["requeue", "77"]] * 2


@pytest.mark.parametrize(("ends", "left"), [("0", 0), ("2", 2), ("1", 1)])
def test_slurm_does_not_requeue_what_is_done_or_failed(checkout, ends, left):
    assert slurm_at_its_limit(checkout, ENDS=ends).returncode == left
    assert scontrol(checkout) == []


def test_slurm_does_not_requeue_what_somebody_stopped(checkout):
    assert slurm_at_its_limit(checkout, ENDS="143", QUICK="1").returncode == 143
    assert scontrol(checkout) == []


def test_slurm_requeues_what_was_preempted(checkout):
    assert slurm_at_its_limit(checkout, ENDS="143", QUICK="1", JOB="PreemptTime=2026-11-21T10:00:00").returncode == 0
    assert scontrol(checkout) == [["requeue", "77"]]


def test_slurm_stops_after_so_many_requeues(checkout):
    result = slurm_at_its_limit(checkout, ENDS="143", SLURM_RESTART_COUNT="100")
    assert result.returncode == 2 and scontrol(checkout) == []
    assert "--requeues=200" in parts(result)["fix"]


def test_slurm_offline_installs_nothing_and_asks_no_hub(checkout):
    checkout.fake("srun")
    assert slurm(checkout, "--offline", "--config=c.py").returncode == 0
    setup, train = checkout.calls("srun")
    assert setup["args"][-2:] == ["launch/setup.sh", "--check"]
    assert (train["env"]["HF_HUB_OFFLINE"], train["env"]["HF_DATASETS_OFFLINE"]) == ("1", "1")
    checkout.record.unlink()
    slurm(checkout, "--offline", "--config=c.py", PIP_NO_INDEX="1", PIP_FIND_LINKS="wheels")
    assert checkout.calls("srun")[0]["args"][-1] == "launch/setup.sh"  # from the wheels at hand


@pytest.mark.parametrize("image", ["train image.sif", "images/jaxalign:1"])
def test_slurm_in_a_container_installs_nothing(checkout, image):
    checkout.fake("srun")
    (checkout.root / "train image.sif").touch()
    result = slurm(checkout, f"--container={image}", "--mounts=/data,/hub", *TRAIN)
    assert result.returncode == 0, result.stderr
    (train,) = checkout.calls("srun")
    root = str(checkout.root)
    if image.endswith(".sif"):
        assert train["args"][2:9] == ["apptainer", "exec", "--nv", "--bind", f"{root},/data,/hub", "--pwd", root]
        assert train["args"][9] == image
    else:
        assert train["args"][2:5] == [
            f"--container-image={image}",
            f"--container-mounts={root}:{root},/data:/data,/hub:/hub",
            f"--container-workdir={root}",
        ]
    assert train["args"][-len(TRAIN) - 5 :] == ["python", "-u", "-m", "jaxalign", "train", *TRAIN][-len(TRAIN) - 5 :]


# An sbatch that runs the script as Slurm does, and again for as long as scontrol puts it back into the queue.
SBATCH = """
import json, shutil, subprocess
args = call["args"]
at = next(i for i, a in enumerate(args) if a.endswith("slurm.sbatch"))
copy = os.path.join(os.environ["HOME"], "slurm_script")
shutil.copy(args[at], copy)
for count in range(10):
    job = {"SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(count)}
    before = sum('"scontrol"' in line for line in open(os.environ["RECORD"]))
    code = subprocess.run(["bash", copy, *args[at + 1:]], env=os.environ | job, cwd=os.environ["HOME"]).returncode
    if before == sum('"scontrol"' in line for line in open(os.environ["RECORD"])):
        sys.exit(code)
"""
# A training of eight steps, three of which fit before the time limit; what is saved lies in the workdir.
TRAINING = """
import pathlib, signal, time
if "train" in call["args"]:
    workdir = next(a.split("=", 1)[1] for a in call["args"] if a.startswith("--config.workdir="))
    saved = pathlib.Path(workdir, "step")
    step = int(saved.read_text()) if saved.exists() else 0
    pathlib.Path(os.environ["RECORD"] + ".task").write_text(str(os.getpid()))
    def stop(*_):
        saved.write_text(str(step))
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    for _ in range(3):
        step += 1
        if step == 8:
            saved.write_text("done")
            sys.exit(0)
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(100)
"""


def test_slurm_a_run_longer_than_its_time_limit_ends_by_itself(checkout, tmp_path):
    for name, body in (("sbatch", SBATCH), ("srun", TRAINING), ("scancel", SCANCEL), ("scontrol", "")):
        checkout.fake(name, body)
    (tmp_path / "run").mkdir()
    command = ["sbatch", "--nodes=2", "launch/slurm.sbatch", "--config=c.py", f"--config.workdir={tmp_path}/run"]
    result = subprocess.run(
        [checkout.bin / command[0], *command[1:]],
        env=checkout.env, cwd=checkout.root, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "step").read_text() == "done"
    trained = [call for call in checkout.calls("srun") if "train" in call["args"]]
    assert len(trained) == 3  # steps 1 to 3, 4 to 6, 7 and 8
    assert scontrol(checkout) == [["requeue", "77"]] * 2

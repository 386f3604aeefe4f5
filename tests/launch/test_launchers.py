"""The launchers against fake gcloud, srun, kubectl and nvidia-smi: what they call, and with which settings."""

import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import IN_IMAGE, KUBERNETES, ROOT, TRAIN, parts

TPU = ["--name=my-tpu", "--zone=us-east5-a"]
# A gcloud that carries out what it is asked on a pretended worker: scp copies, ssh runs the command there.
GCLOUD = """
import shutil, subprocess
args = call["args"]
home = os.path.join(os.environ["HOME"], "worker")
os.makedirs(home, exist_ok=True)
if "describe" in args:
    sys.exit(int(os.environ.get("NO_TPU", "0")))
if "scp" in args:
    shutil.copy(args[4], os.path.join(home, args[5].split(":")[1]))
if "ssh" in args:
    command = next(a for a in args if a.startswith("--command=")).removeprefix("--command=")
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home).returncode)
"""


def with_git(checkout):
    """Makes the checkout a git tree that tracks everything in it, the fake environment too."""
    checkout.fake_setup()
    (checkout.root / "with space.txt").write_text("x")
    subprocess.run(["git", "init", "-q", "."], cwd=checkout.root, check=True)
    checkout.fake("gcloud", GCLOUD)


@pytest.mark.parametrize(("script", "worker"), [("tpu_vm.sh", "0"), ("tpu_pod.sh", "all")])
def test_tpu_copies_the_checkout_sets_it_up_and_trains(checkout, script, worker):
    with_git(checkout)
    result = checkout.run(f"launch/{script}", *TPU, "--project=p", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    scp, ssh = checkout.calls("gcloud")
    assert scp["args"][:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert ssh["args"][:5] == ["compute", "tpus", "tpu-vm", "ssh", "my-tpu"]
    for call in (scp, ssh):
        assert {f"--worker={worker}", "--zone=us-east5-a", "--project=p"} <= set(call["args"])
    (setup,) = checkout.calls("setup")
    assert setup["env"]["JAXALIGN_ACCELERATOR"] == "tpu"
    assert setup["env"]["JAXALIGN_APT"] == "1"
    (train,) = checkout.calls("jaxalign")
    assert train["args"] == ["train", *TRAIN]
    assert train["cwd"].endswith("worker/jaxalign")
    assert train["env"].get("JAXALIGN_TPU_POD") == ("1" if worker == "all" else None)
    assert (checkout.root.parent / "worker" / "jaxalign" / "with space.txt").exists()


def test_tpu_makes_the_machine_where_it_is_not_there(checkout):
    with_git(checkout)
    result = checkout.run("launch/tpu_pod.sh", *TPU, "--type=v5p-32", "--spot", "--", "--config=c.py", NO_TPU="1")
    assert result.returncode == 0, result.stderr
    describe, create = checkout.calls("gcloud")[:2]
    assert describe["args"][3:5] == ["describe", "my-tpu"]
    assert create["args"][3:] == [
        "create", "my-tpu", "--accelerator-type=v5p-32", "--version=v2-alpha-tpuv5", "--spot", "--zone=us-east5-a",
    ]  # fmt: skip
    checkout.record.unlink()
    checkout.run("launch/tpu_pod.sh", *TPU, "--type=v5p-32", "--", "--config=c.py")
    assert [call["args"][3] for call in checkout.calls("gcloud")] == ["describe", "scp", "ssh"]


def test_tpu_detached_returns_and_logs(checkout):
    with_git(checkout)
    result = checkout.run("launch/tpu_vm.sh", *TPU, "--detach", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    for _ in range(600):
        if checkout.calls("jaxalign"):
            break
        time.sleep(0.1)
    assert checkout.calls("jaxalign")[0]["args"] == ["train", *TRAIN]
    assert (checkout.root.parent / "worker" / "jaxalign" / "train.log").exists()


def test_tpu_reports_the_failure_of_training(checkout):
    with_git(checkout)
    checkout.fake(checkout.root / ".venv" / "bin" / "jaxalign", "sys.exit(3)")
    assert checkout.run("launch/tpu_vm.sh", *TPU, "--", "--config=c.py").returncode == 3


def test_gpu_node_one_process_sees_every_gpu(checkout):
    checkout.fake_setup()
    result = checkout.run("launch/gpu_node.sh", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert [call["name"] for call in checkout.calls()] == ["setup", "python"]
    (train,) = checkout.calls("python")
    assert train["args"] == ["-m", "jaxalign", "train", *TRAIN]
    assert not any(name.startswith(("JAX_", "CUDA")) for name in train["env"])
    assert train["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92" and "FRACTION=0.92" in result.stdout


@pytest.mark.parametrize("name", ["XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"])
def test_gpu_node_leaves_a_share_that_is_set(checkout, name):
    checkout.fake_setup()
    result = checkout.run("launch/gpu_node.sh", *TRAIN, **{name: "0.5"})
    (train,) = checkout.calls("python")
    found = {k: v for k, v in train["env"].items() if k.endswith("MEM_FRACTION")}
    assert found == {name: "0.5"} and "FRACTION" not in result.stdout


@pytest.mark.parametrize("visible", ["", "5,7"])
def test_gpu_node_one_process_per_gpu(checkout, visible):
    checkout.fake_setup()
    checkout.fake("nvidia-smi", "print('GPU 0: H200 (UUID: x)\\nGPU 1: H200 (UUID: y)')")
    env = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    result = checkout.run("launch/gpu_node.sh", "--processes=per-gpu", "--port=9000", "--", *TRAIN, **env)
    assert result.returncode == 0, result.stderr
    trains = sorted(checkout.calls("python"), key=lambda call: call["env"]["JAX_PROCESS_ID"])
    assert [call["env"]["CUDA_VISIBLE_DEVICES"] for call in trains] == (visible or "0,1").split(",")
    for index, call in enumerate(trains):
        assert call["args"] == ["-m", "jaxalign", "train", *TRAIN]
        assert call["env"]["JAX_COORDINATOR_ADDRESS"] == "localhost:9000"
        assert (call["env"]["JAX_NUM_PROCESSES"], call["env"]["JAX_PROCESS_ID"]) == ("2", str(index))


def test_gpu_node_a_failed_process_ends_the_others(checkout):
    checkout.fake_setup()
    body = "import time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\ntime.sleep(300)\n"
    checkout.fake(checkout.root / ".venv" / "bin" / "python", body)
    result = checkout.run("launch/gpu_node.sh", "--processes=per-gpu", "--config=c.py", CUDA_VISIBLE_DEVICES="0,1,2")
    assert result.returncode == 7
    # ... and it has come back before `run` gives up on it, which is long before the others' sleep ends


def test_gpu_node_passes_sigterm_on_and_waits_for_the_checkpoints(checkout):
    checkout.fake_setup()
    body = """
import signal, time
def save(*_):
    time.sleep(0.5)
    open(os.environ["RECORD"] + ".saved" + os.environ["JAX_PROCESS_ID"], "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(os.environ["RECORD"] + ".ready" + os.environ["JAX_PROCESS_ID"], "w").close()
time.sleep(100)
"""
    checkout.fake(checkout.root / ".venv" / "bin" / "python", body)
    process = subprocess.Popen(
        ["bash", str(checkout.root / "launch/gpu_node.sh"), "--processes=per-gpu", "--config=c.py"],
        env=checkout.env | {"CUDA_VISIBLE_DEVICES": "0,1"},
        cwd=checkout.root,
    )
    marks = [checkout.record.with_name(f"calls.jsonl.{kind}{i}") for kind in ("ready", "saved") for i in (0, 1)]
    for _ in range(600):
        if marks[0].exists() and marks[1].exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert marks[2].exists()
    assert marks[3].exists()


# What each launcher is told, with what it would have to call.
DRY = {
    "quickstart.sh": (["--config.seed=1"], "jaxalign.examples.quickstart --config.seed=1"),
    "gpu_node.sh": (["--config=c.py"], "-m jaxalign train --config=c.py"),
    "tpu_vm.sh": ([*TPU, "--type=v6e-8", "--", "--config=c.py"], "gcloud compute tpus tpu-vm create my-tpu"),
    "tpu_pod.sh": ([*TPU, "--type=v5p-32", "--spot", "--", "--config=c.py"], "jaxalign train --config=c.py"),
    "slurm.sbatch": (["--offline", "--config=c.py"], "-u -m jaxalign train --config=c.py"),
    "kubernetes.sh": (
        [*KUBERNETES, "--gpus=8", "--", "--config=/jaxalign/c.py", "--config.workdir=gs://b/r"],
        "kubectl apply",
    ),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("script", DRY)
def test_a_dry_run_starts_nothing_and_says_what_it_would(checkout, script, last):
    """Wherever the word stands, with an environment that is not there yet, and with every outward command at hand."""
    arguments, wanted = DRY[script]
    for command in ("gcloud", "srun", "scontrol", "scancel", "kubectl", "nvidia-smi"):
        checkout.fake(command)
    subprocess.run(["rm", "-r", str(checkout.root / ".venv")], check=True)
    before = sorted(checkout.root.rglob("*"))
    words = [*arguments, "--dry_run"] if last else ["--dry_run", *arguments]
    result = checkout.run(f"launch/{script}", *words)
    assert result.returncode == 0, result.stderr
    # what it would do is carried out, word for word, but for --dry_run itself
    assert "would run: " in result.stdout and wanted in result.stdout and "--dry_run" not in result.stdout
    if script in ("quickstart.sh", "gpu_node.sh"):
        assert "-m venv" in result.stdout and "pip install" in result.stdout
    assert [call for call in checkout.calls() if call["name"] != "nvidia-smi"] == []  # asking what is there is no start
    assert sorted(checkout.root.rglob("*")) == before


def test_tpu_makes_a_preempted_spot_machine_again(checkout):
    with_git(checkout)
    checkout.fake("gcloud", "if 'describe' in call['args']: print('PREEMPTED'); sys.exit(0)\n" + GCLOUD)
    result = checkout.run("launch/tpu_vm.sh", *TPU, "--type=v6e-8", "--spot", "--", "--config=c.py")
    assert result.returncode == 0, result.stderr
    assert [call["args"][3] for call in checkout.calls("gcloud")] == ["describe", "delete", "create", "scp", "ssh"]


@pytest.mark.parametrize(
    ("script", "arguments", "found"),
    [
        ("tpu_vm.sh", ["--zone=z", "--", "--config=c"], "--name=''"),
        ("tpu_pod.sh", [*TPU], "nothing after --"),
        ("tpu_pod.sh", [*TPU, "--wat", "--", "--config=c"], "argument '--wat'"),
        ("tpu_pod.sh", [*TPU, "--", "--config=c", "--config.workdir=runs/x"], "--config.workdir=runs/x on every host"),
        ("gpu_node.sh", [], "no arguments for jaxalign train"),
        ("gpu_node.sh", ["--processes=two", "--config=c"], "--processes=two"),
        ("slurm.sbatch", [], "no arguments for jaxalign train"),
        ("slurm.sbatch", ["--config=c"], "no srun on the PATH"),
        ("slurm.sbatch", ["--requeues=often", "--config=c"], "--requeues=often"),
        ("slurm.sbatch", ["--mounts=/data", "--config=c"], "--mounts=/data without --container"),
        ("kubernetes.sh", ["--image=i", "--gpus=8", "--", "--config=c"], "--name=''"),
        ("kubernetes.sh", [*KUBERNETES, "--", "--config=c"], "neither --gpus nor --tpu"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=x", "--", "--config=c"], "--gpus=x"),
        ("kubernetes.sh", [*KUBERNETES, "--tpu=tpu-v5p-slice", "--", "--config=c"], "--tpu=tpu-v5p-slice"),
        ("kubernetes.sh", ["--name=Bad_Name", "--image=i", "--gpus=8", "--", "--config=c"], "--name=Bad_Name"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--", *IN_IMAGE], "no kubectl on the PATH"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--", "--config=c", "--config.workdir=gs://b"], "no file c here"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--", "--config.workdir=gs://b"], "no --config=FILE after --"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--file=r.py", "--", *IN_IMAGE], "no file r.py here"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--claim=x:data", "--", *IN_IMAGE], "--claim=x:data"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--requests=cpu", "--", *IN_IMAGE], "--requests=cpu"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--toleration=a:Never", "--", *IN_IMAGE], "--toleration=a:Never"),
    ],
)
def test_a_wrong_call_says_found_expected_and_fix(checkout, script, arguments, found):
    checkout.fake_setup()
    if script.startswith("tpu"):
        checkout.fake("gcloud")
    result = checkout.run(f"launch/{script}", *arguments)
    assert result.returncode == 2
    assert parts(result)["found"].startswith(found)
    assert parts(result)["expected"]
    assert parts(result)["fix"]
    assert not checkout.calls()


@pytest.mark.parametrize(
    "script",
    ["tpu_vm.sh", "tpu_pod.sh", "gpu_node.sh", "kubernetes.sh", "setup.sh", "quickstart.sh", "slurm.sbatch"],
)
def test_help(checkout, script):
    if script != "setup.sh":
        checkout.fake_setup()
    result = checkout.run(f"launch/{script}", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ") and f"launch/{script}" in result.stdout
    assert not checkout.calls()  # nothing is installed for a page of help


def test_train_without_the_environment_says_how_to_make_it(checkout):
    script = str(checkout.root / "launch" / "train.py")
    result = subprocess.run(  # -I -S: a Python without installed packages
        [sys.executable, "-I", "-S", script, "--config=c.py"], cwd=checkout.root, capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "absl" in parts(result)["found"]
    assert parts(result)["fix"] == "bash launch/setup.sh, then .venv/bin/python launch/train.py --config=FILE"


def test_train_is_the_command_of_the_clone():
    result = subprocess.run([sys.executable, "launch/train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "jaxalign train --config=FILE" in result.stdout


def test_the_quickstart_brings_what_draws_its_pictures(checkout):
    checkout.fake_setup()
    assert checkout.run("launch/quickstart.sh", "--config.seed=1").returncode == 0
    setup, run = checkout.calls()
    assert setup["args"] == ["plots"]
    assert run["args"] == ["-m", "jaxalign.examples.quickstart", "--config.seed=1"]

"""The launchers against fake gcloud, srun, kubectl and nvidia-smi: what they call, and with which settings."""

import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.launch.conftest import ROOT

# Arguments that any careless quoting breaks.
TRAIN = [
    "--config=configs/my dpo.py",
    '--config.model.path=it\'s $HOME `x` $(y) "z"',
    "--config.data.sources=a.jsonl,b;c",
]

TPU = ["--name=my-tpu", "--zone=us-east5-a"]
KUBERNETES = ["--name=dpo", "--image=images/jaxalign:1"]

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


def parts(result: subprocess.CompletedProcess) -> dict[str, str]:
    """The three parts of an error."""
    lines = [
        line.split(":", 1) for line in result.stderr.splitlines() if line.startswith(("found:", "expected:", "fix:"))
    ]
    return {key: value.strip() for key, value in lines}


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
    for _ in range(100):
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
    body = "import time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\ntime.sleep(100)\n"
    checkout.fake(checkout.root / ".venv" / "bin" / "python", body)
    start = time.monotonic()
    result = checkout.run("launch/gpu_node.sh", "--processes=per-gpu", "--config=c.py", CUDA_VISIBLE_DEVICES="0,1,2")
    assert result.returncode == 7
    assert time.monotonic() - start < 30


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
    for _ in range(200):
        if marks[0].exists() and marks[1].exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert marks[2].exists()
    assert marks[3].exists()


def test_slurm_sets_up_once_then_trains_on_every_task(checkout):
    checkout.fake("srun")
    spool = checkout.root.parent / "spool"
    spool.mkdir()
    copy = spool / "slurm_script"  # Slurm runs a copy, far from the checkout
    copy.write_text((checkout.root / "launch/slurm.sbatch").read_text())
    result = subprocess.run(
        ["bash", str(copy), *TRAIN],
        env=checkout.env | {"SLURM_SUBMIT_DIR": str(checkout.root)},
        cwd=spool,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    setup, train = checkout.calls("srun")
    assert setup["args"] == ["--nodes=1", "--ntasks=1", "bash", "launch/setup.sh"]
    assert train["args"] == [
        "--kill-on-bad-exit=1", "--label", ".venv/bin/python", "-u", "-m", "jaxalign", "train", *TRAIN,
    ]  # fmt: skip
    assert {setup["cwd"], train["cwd"]} == {str(checkout.root)}


def test_slurm_header_gives_one_task_for_each_node(checkout):
    lines = (checkout.root / "launch/slurm.sbatch").read_text().splitlines()
    header = [line for line in lines if line.startswith("#SBATCH")]
    assert "#SBATCH --ntasks-per-node=1" in header
    assert any(line.startswith("#SBATCH --signal=TERM@") for line in header)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first_command  # sbatch stops there


def test_kubernetes_applies_a_jobset_for_gpus(checkout):
    checkout.fake("kubectl")
    result = checkout.run(
        "launch/kubernetes.sh", *KUBERNETES, "--gpus=8", "--nodes=2", "--claim=runs", "--secret=keys", "--", *TRAIN
    )
    assert result.returncode == 0, result.stderr
    (apply,) = checkout.calls("kubectl")
    assert apply["args"] == ["apply", "--filename=-"]
    jobset = yaml.safe_load(apply["stdin"])
    assert (jobset["kind"], jobset["metadata"]) == ("JobSet", {"name": "dpo", "namespace": "default"})
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (2, 2, "Indexed")
    container = job["template"]["spec"]["containers"][0]
    assert container["image"] == "images/jaxalign:1"
    assert container["command"][-2:] == ["jaxalign", "train"]
    # Kubernetes turns $$ into $ and $(NAME) into a variable's value: every $ is doubled.
    assert [argument.replace("$$", "$") for argument in container["args"]] == TRAIN
    assert all("$" not in argument.replace("$$", "") for argument in container["args"])
    env = {item["name"]: item for item in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "dpo-worker-0-0.dpo:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == "2"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]


def test_kubernetes_prints_a_jobset_for_tpus(checkout):
    tpu = ["--tpu=tpu-v5p-slice", "--topology=2x2x4", "--chips=4", "--nodes=4"]
    result = checkout.run("launch/kubernetes.sh", *KUBERNETES, *tpu, "--print", "--", "--config=c.py")
    assert result.returncode == 0, result.stderr
    assert not checkout.calls("kubectl")
    pod = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


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
        ("kubernetes.sh", ["--image=i", "--gpus=8", "--", "--config=c"], "--name=''"),
        ("kubernetes.sh", [*KUBERNETES, "--", "--config=c"], "neither --gpus nor --tpu"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=x", "--", "--config=c"], "--gpus=x"),
        ("kubernetes.sh", [*KUBERNETES, "--tpu=tpu-v5p-slice", "--", "--config=c"], "--tpu=tpu-v5p-slice"),
        ("kubernetes.sh", ["--name=Bad_Name", "--image=i", "--gpus=8", "--", "--config=c"], "--name=Bad_Name"),
        ("kubernetes.sh", [*KUBERNETES, "--gpus=8", "--", "--config=c"], "no kubectl on the PATH"),
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
    assert result.returncode == 0 and result.stdout.startswith("jaxalign train --config=FILE")


def test_the_quickstart_brings_what_draws_its_pictures(checkout):
    checkout.fake_setup()
    assert checkout.run("launch/quickstart.sh", "--config.seed=1").returncode == 0
    setup, run = checkout.calls()
    assert setup["args"] == ["plots"]
    assert run["args"] == ["-m", "jaxalign.pipeline.quickstart", "--config.seed=1"]

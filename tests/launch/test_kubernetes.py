"""launch/kubernetes.sh against a fake kubectl: the manifest it applies, and what it refuses."""

import pytest
import yaml

from tests.launch.conftest import KUBERNETES, TRAIN, parts


def documents(result_or_text) -> tuple[dict, dict]:
    """The ConfigMap and the JobSet of a manifest."""
    files, jobset = yaml.safe_load_all(result_or_text)
    assert (files["kind"], jobset["kind"]) == ("ConfigMap", "JobSet")
    return files, jobset


def pod_of(jobset) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_kubernetes_applies_a_jobset_for_gpus(checkout):
    checkout.fake("kubectl")
    own_config(checkout)
    train = [*TRAIN, "--config.workdir=/data/run"]
    result = checkout.run(
        "launch/kubernetes.sh", *KUBERNETES, "--gpus=8", "--nodes=2", "--claim=runs", "--secret=keys", "--", *train
    )
    assert result.returncode == 0, result.stderr
    (apply,) = checkout.calls("kubectl")
    assert apply["args"] == ["apply", "--filename=-"]
    _, jobset = documents(apply["stdin"])
    assert jobset["metadata"] == {"name": "dpo", "namespace": "default"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0  # the set starts again, with the same arguments
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (2, 2, "Indexed")
    container = pod_of(jobset)["containers"][0]
    assert container["image"] == "images/jaxalign:1"
    assert container["command"][-2:] == ["jaxalign", "train"]
    # Kubernetes turns $$ into $ and $(NAME) into a variable's value: every $ is doubled.
    assert [argument.replace("$$", "$") for argument in container["args"]] == train
    assert all("$" not in argument.replace("$$", "") for argument in container["args"])
    env = {item["name"]: item for item in container["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "dpo-worker-0-0.dpo:8476"
    assert env["JAX_NUM_PROCESSES"]["value"] == "2"
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"]["value"] == "0.92"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["resources"] == {"requests": {}, "limits": {"nvidia.com/gpu": "8"}}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]


def own_config(checkout) -> str:
    text = "# a config of one's own: 'quotes', \"quotes\", $HOME: {}\ndef get_config(): ...\n"
    (checkout.root / "configs").mkdir(exist_ok=True)
    for name in ("my dpo.py", "c.py"):
        (checkout.root / "configs" / name).write_text(text)
    return text


def test_kubernetes_takes_ones_own_files_along(checkout):
    """They lie in the pod where the arguments say they are, and hold what they hold here."""
    text = own_config(checkout)
    (checkout.root / "my_rewards.py").write_text("def polite(): ...\n")
    result = checkout.run(
        "launch/kubernetes.sh", *KUBERNETES, "--gpus=8", "--file=my_rewards.py", "--dry_run", "--",
        "--config=configs/c.py:small", "--config.workdir=gs://bucket/run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    files, jobset = documents(result.stdout)
    mounts = {m["mountPath"]: m for m in pod_of(jobset)["containers"][0]["volumeMounts"] if m["name"] == "files"}
    assert set(mounts) == {"/jaxalign/configs/c.py", "/jaxalign/my_rewards.py"}
    assert files["data"][mounts["/jaxalign/configs/c.py"]["subPath"]] == text
    assert {"name": "files", "configMap": {"name": files["metadata"]["name"]}} in pod_of(jobset)["volumes"]
    assert not checkout.calls()


def test_kubernetes_takes_tolerations_requests_and_limits(checkout):
    own_config(checkout)
    result = checkout.run(
        "launch/kubernetes.sh", *KUBERNETES, "--gpus=8", "--requests=cpu=32,memory=200Gi", "--limits=memory=400Gi",
        "--toleration=team=train:NoSchedule", "--toleration=spot", "--dry_run",
        "--", "--config=configs/c.py", "--config.workdir", "s3://bucket/run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    pod = pod_of(documents(result.stdout)[1])
    assert pod["containers"][0]["resources"] == {
        "requests": {"cpu": "32", "memory": "200Gi"},
        "limits": {"memory": "400Gi", "nvidia.com/gpu": "8"},
    }
    assert pod["tolerations"] == [
        {"key": "team", "operator": "Equal", "value": "train", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]


def test_kubernetes_prints_a_jobset_for_tpus(checkout):
    tpu = ["--tpu=tpu-v5p-slice", "--topology=2x2x4", "--chips=4", "--nodes=4"]
    train = ["--config=/jaxalign/configs/dpo.py", "--config.workdir=gs://bucket/run"]  # the image's own config
    result = checkout.run("launch/kubernetes.sh", *KUBERNETES, *tpu, "--print", "--", *train)
    assert result.returncode == 0, result.stderr
    assert not checkout.calls("kubectl")
    pod = pod_of(yaml.safe_load(result.stdout))
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


@pytest.mark.parametrize(
    ("claim", "workdir"),
    [
        ([], ["--config.workdir=/data/run"]),
        ([], []),
        ([], ["--config.workdir=runs/x"]),
        (["--claim=runs"], ["--config.workdir=runs/x"]),
        (["--claim=runs"], ["--config.workdir", "/data/../tmp/x"]),
        (["--claim=runs:/shared"], ["--config.workdir=/data/run"]),
        (["--claim=runs"], ["--config.workdir=file://localhost/tmp/x"]),
    ],
)
def test_kubernetes_refuses_a_workdir_that_goes_with_the_pod(checkout, claim, workdir):
    checkout.fake("kubectl")
    own_config(checkout)
    train = ["--config=configs/c.py", *workdir]
    result = checkout.run("launch/kubernetes.sh", *KUBERNETES, "--gpus=8", *claim, "--", *train)
    assert result.returncode == 2 and not checkout.calls()
    assert "--config.workdir" in parts(result)["found"] and "--config.workdir=" in parts(result)["fix"]
    assert "Traceback" not in result.stderr

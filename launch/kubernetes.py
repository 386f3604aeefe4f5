"""Fills in launch/kubernetes.yaml from what launch/kubernetes.sh was told, and checks it.

Settings come in the environment, the arguments of `jaxalign train` on the command line. Needs Python alone.
"""

import json
import os
import posixpath
import re
import string
import sys
from pathlib import Path

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
HOME = "/jaxalign"  # where launch/Dockerfile puts the package, and where relative paths of the arguments begin
LIMIT = 1 << 20  # bytes that a ConfigMap may hold


def fail(found, expected, fix):
    """The three parts of an error, as launch/say.sh prints them."""
    print(f"found:    {found}\nexpected: {expected}\nfix:      {fix}", file=sys.stderr)
    sys.exit(2)


def claim(text):
    """(claim, where it is mounted) of NAME[:DIR]."""
    name, _, directory = text.partition(":")
    directory = directory or "/data"
    if not name or not directory.startswith("/") or posixpath.normpath(directory) in ("/", HOME):
        fail(f"--claim={text}", "NAME or NAME:DIR, an absolute directory of its own", "--claim=runs:/data")
    return name, posixpath.normpath(directory)


def tolerations(text):
    """The lines of KEY[=VALUE][:EFFECT], as `kubectl taint` writes them."""
    found = []
    for line in text.splitlines():
        taint, _, effect = line.partition(":")
        key, equals, value = taint.partition("=")
        if not key or (effect and effect not in EFFECTS):
            fail(
                f"--toleration={line}",
                f"KEY[=VALUE][:EFFECT], an effect of {', '.join(EFFECTS)}",
                "--toleration=team=train:NoSchedule",
            )
        found.append(
            {"key": key}
            | ({"operator": "Equal", "value": value} if equals else {"operator": "Exists"})
            | ({"effect": effect} if effect else {})
        )
    return found


def resources(flag, text):
    """NAME=QUANTITY,... as a dict."""
    found = {}
    for item in text.split(",") if text else ():
        match = re.fullmatch(r"([A-Za-z0-9./-]+)=([0-9.]+(?:m|[kKMGTP]i?)?)", item)
        if not match:
            fail(f"--{flag}={text}", "NAME=QUANTITY, several with commas", f"--{flag}=cpu=32,memory=200Gi")
        found[match[1]] = match[2]
    return found


def check_workdir(arguments, mounts):
    """Refuses a run whose results would go with the pod.

    Args:
      arguments: those of `jaxalign train`.
      mounts: directories at which something is mounted that outlives a pod.
    """
    workdir = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config.workdir":
            workdir = value if equals else (arguments[i + 1] if i + 1 < len(arguments) else "")
    fix = "--config.workdir=gs://BUCKET/RUN, or --claim=PVC before the -- and --config.workdir=/data/RUN after it"
    if mounts:
        fix = f"--config.workdir={mounts[0]}/RUN"
    expected = "one that outlives a pod: an object store, or a directory under --claim"
    if workdir is None:
        fail("no --config.workdir after --", f"{expected}; said here, since the config's own is not seen", fix)
    if "://" in workdir and not workdir.startswith("file:"):
        return
    path = posixpath.normpath(posixpath.join(HOME, workdir))
    if not any(path.startswith(mount + "/") for mount in mounts):
        where = f"only {', '.join(mounts)} is mounted" if mounts else "nothing is mounted"
        fail(f"--config.workdir={workdir}, and {where}", expected, fix)


def own_files(arguments, more):
    """The files that go along in a ConfigMap: {path in the pod: text}.

    A file lies in the pod where the arguments say it is, so that they and the paths inside it mean the same there.

    Args:
      arguments: those of `jaxalign train`; the config file among them goes along.
      more: other files, such as a reward's.
    """
    configs = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            configs.append(value if equals else (arguments[i + 1] if i + 1 < len(arguments) else ""))
    if not configs:
        fail("no --config=FILE after --", "the arguments of jaxalign train", "-- --config=configs/dpo.py")
    found = {}
    for file in [*configs, *more]:
        name = file
        if not Path(name).is_file() and ":" in name and file in configs:
            name = name.rsplit(":", 1)[0]  # FILE:ARGUMENT
        if not Path(name).is_file():
            if name.startswith("/") and file in configs:
                continue  # a path of the image
            fail(
                f"no file {name} here",
                "a file of this machine, or an absolute path of the image",
                f"--config={HOME}/configs/dpo.py",
            )
        target = posixpath.normpath(posixpath.join(HOME, name))
        if not name.startswith("/") and not target.startswith(HOME + "/"):
            fail(f"{name} is outside of this directory", "a path that means the same in the pod", os.path.abspath(name))
        try:
            found[target] = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            fail(
                f"{name} is not UTF-8 text",
                "a config or a Python file; data go to the claim or a bucket",
                f"leave out --file={name}",
            )
    size = sum(len(text.encode()) for text in found.values())
    if size > LIMIT * 9 // 10:
        fail(
            f"{size:,} bytes in {', '.join(found)}",
            f"at most {LIMIT:,} in a ConfigMap",
            "data go to the claim or a bucket",
        )
    return found


def main(template, arguments, env):
    """The manifest: a ConfigMap with the run's own files where it has some, then the JobSet. Every value is written as
    JSON, which is YAML, so that no character of it can be misread."""
    volumes = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]  # NCCL's shared memory
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}]
    lasting = []
    if env["claim"]:
        name, directory = claim(env["claim"])
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": name}})
        mounts.append({"name": "data", "mountPath": directory})
        lasting.append(directory)
    check_workdir(arguments, lasting)
    files = own_files(arguments, env["file"].splitlines())
    if files:
        volumes.append({"name": "files", "configMap": {"name": f"{env['name']}-files"}})
        mounts += [
            {"name": "files", "mountPath": path, "subPath": f"file-{i}", "readOnly": True}
            for i, path in enumerate(files)
        ]
        data = {f"file-{i}": text for i, text in enumerate(files.values())}
        meta = {"name": f"{env['name']}-files", "namespace": env["namespace"]}
        print(json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}) + "\n---")
    accelerator = {"nvidia.com/gpu": env["gpus"]} if env["gpus"] else {"google.com/tpu": env["chips"]}
    requests = resources("requests", env["requests"])
    selector = {}
    if env["tpu"]:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": env["tpu"],
            "cloud.google.com/gke-tpu-topology": env["topology"],
        }
    values = {
        "name": env["name"],
        "namespace": env["namespace"],
        "image": env["image"],
        "args": [argument.replace("$", "$$") for argument in arguments],  # Kubernetes expands $(NAME)
        "node_selector": selector,
        "tolerations": tolerations(env["toleration"]),
        "restarts": int(env["restarts"]),
        "nodes": int(env["nodes"]),
        "processes": env["nodes"],
        "coordinator": "{0}-worker-0-0.{0}:8476".format(env["name"]),
        "memory_fraction": env.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.92",
        "requests": requests,
        "limits": resources("limits", env["limits"]) | accelerator,
        "volumes": volumes,
        "mounts": mounts,
        "env_from": [{"secretRef": {"name": env["secret"]}}] if env["secret"] else [],
    }
    text = "".join(line for line in template.splitlines(True) if not line.startswith("#"))
    print(string.Template(text).substitute({key: json.dumps(value) for key, value in values.items()}))


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".yaml").read_text(), sys.argv[1:], os.environ)

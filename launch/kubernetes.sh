#!/usr/bin/env bash
# Trains on Kubernetes as a JobSet (the JobSet controller must be on the cluster): fills in launch/kubernetes.yaml and
# applies it. Deleting the JobSet and running this again resumes.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/kubernetes.sh --name=NAME --image=IMAGE (--gpus=N | --tpu=TYPE --topology=T --chips=N) [--nodes=N]
       [--namespace=NS] [--claim=PVC] [--secret=SECRET] [--restarts=N] [--print] -- --config=FILE [--config.FIELD=VALUE ...]

  --name        of the JobSet: lower-case letters, digits and -
  --image       made from launch/Dockerfile
  --gpus        GPUs of each pod
  --tpu         GKE's accelerator name, such as tpu-v5p-slice, tpu-v6e-slice; --topology such as 2x2x4; --chips of each pod
  --nodes       pods, one for each host (default: 1)
  --namespace   default: default
  --claim       a persistent volume claim, mounted at /data (then --config.workdir=/data/...; or use gs://)
  --secret      a secret whose keys become environment variables (HF_TOKEN, WANDB_API_KEY)
  --restarts    of the set after a failure or a preemption (default: 10)
  --print       print the manifest and apply nothing
  after --      the arguments of `jaxalign train`
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/errors.sh
source "$root/launch/errors.sh"
example="bash launch/kubernetes.sh --name=dpo --image=IMAGE --gpus=8 -- --config=configs/dpo.py"
export name="" image="" gpus="" tpu="" topology="" chips="" nodes=1 namespace=default claim="" secret="" restarts=10
print=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --name=* | --image=* | --gpus=* | --tpu=* | --topology=* | --chips=* | --nodes=* | --namespace=* | --claim=* | --secret=* | --restarts=*)
      flag=${1%%=*}
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --print) print=1 ;;
    --) shift && break ;;
    *) usage >&2 && fail "argument '$1'" "the flags above, written --flag=value, then -- and the arguments of jaxalign train" "$example" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$image" ]; then usage >&2 && fail "--name='$name' --image='$image'" "both" "$example"; fi
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name=$name" "at most 40 lower-case letters, digits and -, a letter first" "$example"
if [ -n "$tpu" ]; then
  if [ -n "$gpus" ] || [ -z "$topology" ] || [ -z "$chips" ]; then
    fail "--tpu=$tpu --topology='$topology' --chips='$chips' --gpus='$gpus'" "--tpu with --topology and --chips, without --gpus" \
      "bash launch/kubernetes.sh --name=$name --image=$image --tpu=tpu-v5p-slice --topology=2x2x4 --chips=4 --nodes=4 -- --config=FILE"
  fi
elif [ -z "$gpus" ]; then
  fail "neither --gpus nor --tpu" "one of them" "$example"
fi
for count in nodes gpus chips restarts; do
  [[ ${!count:-1} =~ ^[0-9]+$ ]] || fail "--$count=${!count}" "a number" "$example"
done
[ $# -gt 0 ] || fail "nothing after --" "the arguments of jaxalign train" "$example"

python=python3
command -v "$python" >/dev/null || python=$root/.venv/bin/python
# JSON is YAML: every value is written as JSON, so that no character of it can be misread.
manifest=$("$python" - "$root/launch/kubernetes.yaml" "$@" <<'PY'
import json, os, string, sys
template, *arguments = sys.argv[1:]
env = os.environ
accelerator = {"nvidia.com/gpu": env["gpus"]} if env["gpus"] else {"google.com/tpu": env["chips"]}
selector = {}
if env["tpu"]:
    selector = {"cloud.google.com/gke-tpu-accelerator": env["tpu"], "cloud.google.com/gke-tpu-topology": env["topology"]}
volumes = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]  # NCCL's shared memory
mounts = [{"name": "memory", "mountPath": "/dev/shm"}]
if env["claim"]:
    volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": env["claim"]}})
    mounts.append({"name": "data", "mountPath": "/data"})
values = dict(
    name=env["name"], namespace=env["namespace"], image=env["image"],
    args=[argument.replace("$", "$$") for argument in arguments],  # Kubernetes expands $(NAME)
    node_selector=selector,
    restarts=int(env["restarts"]), nodes=int(env["nodes"]), processes=env["nodes"],
    coordinator="{0}-worker-0-0.{0}:8476".format(env["name"]), limits=accelerator, volumes=volumes, mounts=mounts,
    env_from=[{"secretRef": {"name": env["secret"]}}] if env["secret"] else [],
)
with open(template) as file:
    text = "".join(line for line in file if not line.startswith("#"))
print(string.Template(text).substitute({key: json.dumps(value) for key, value in values.items()}))
PY
)
if [ -n "$print" ]; then
  printf '%s\n' "$manifest"
  exit 0
fi
command -v kubectl >/dev/null || fail "no kubectl on the PATH" "kubectl with access to the cluster" "add --print to see the manifest"
printf '%s\n' "$manifest" | kubectl apply --filename=-
echo "follow it with: kubectl logs --namespace=$namespace --follow job/$name-worker-0"

#!/usr/bin/env bash
# Trains on Kubernetes as a JobSet (the JobSet controller must be on the cluster): fills in launch/kubernetes.yaml and
# applies it. A pod that fails or is taken away restarts the set, which resumes; so does deleting it and running this again.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/kubernetes.sh --name=NAME --image=IMAGE (--gpus=N | --tpu=TYPE --topology=T --chips=N) [--nodes=N]
       [--namespace=NS] [--claim=PVC[:DIR]] [--secret=SECRET] [--requests=R] [--limits=R] [--toleration=T] [--file=FILE]
       [--restarts=N] [--dry_run] -- --config=FILE --config.workdir=DIR [--config.FIELD=VALUE ...]

  --name        of the JobSet: lower-case letters, digits and -
  --image       made from launch/Dockerfile
  --gpus        GPUs of each pod
  --tpu         GKE's accelerator name, such as tpu-v5p-slice, tpu-v6e-slice; --topology such as 2x2x4; --chips of each pod
  --nodes       pods, one for each host (default: 1)
  --namespace   default: default
  --claim       a persistent volume claim, mounted at /data or DIR
  --secret      a secret whose keys become environment variables (HF_TOKEN, WANDB_API_KEY)
  --requests    of each pod beside its accelerators: cpu=32,memory=200Gi; --limits likewise
  --toleration  a taint of the nodes that is no hindrance: KEY[=VALUE][:EFFECT]; may be given several times
  --file        a file that goes along beside the config file, such as a reward's; may be given several times
  --restarts    of the set after a failure or a preemption, each of which resumes (default: 10)
  --dry_run     print the manifest and apply nothing (also --print)
  after --      the arguments of `jaxalign train`: a config file of this machine goes along, and lies in the pods where the
                argument says; the workdir is in an object store or under --claim, since a pod's own disk goes with it
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/say.sh
source "$root/launch/say.sh"
example="bash launch/kubernetes.sh --name=dpo --image=IMAGE --gpus=8 -- --config=configs/dpo.py --config.workdir=gs://BUCKET/RUN"
take_dry_run "$@"
set -- "${arguments[@]}"
export name="" image="" gpus="" tpu="" topology="" chips="" nodes=1 namespace=default claim="" secret="" restarts=10 requests="" limits="" toleration="" file=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --name=* | --image=* | --gpus=* | --tpu=* | --topology=* | --chips=* | --nodes=* | --namespace=* | --claim=* | --secret=* | --restarts=* | --requests=* | --limits=*)
      flag=${1%%=*}
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --toleration=* | --file=*)  # one a line
      flag=${1%%=*} flag=${flag#--}
      printf -v "$flag" '%s%s\n' "${!flag}" "${1#*=}"
      ;;
    --print) dry_run=1 ;;
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
manifest=$("$python" "$root/launch/kubernetes.py" "$@")
if [ -n "$dry_run" ]; then
  printf '# would run: kubectl apply --filename=-\n%s\n' "$manifest"
  exit 0
fi
command -v kubectl >/dev/null || fail "no kubectl on the PATH" "kubectl with access to the cluster" "add --dry_run to see the manifest"
printf '%s\n' "$manifest" | kubectl apply --filename=-
echo "follow it with: kubectl logs --namespace=$namespace --follow job/$name-worker-0"

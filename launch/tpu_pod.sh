#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice from your own machine: copies this checkout to every worker, sets each up, and starts
# the same command on all of them; jax.distributed finds the others by itself. Run again to resume.
set -euo pipefail

usage() {
  cat <<TEXT
usage: bash launch/${TPU_LAUNCHER:-tpu_pod.sh} --name=NAME --zone=ZONE [--project=P] [--type=TYPE] [--version=V] [--spot] [--detach] [--dry_run]
       -- --config=FILE [--config.FIELD=VALUE ...]

  --name, --zone    the TPU VM, as \`gcloud compute tpus tpu-vm list\` shows it
  --project         default: gcloud's own
  --type            accelerator type such as v5litepod-16, v5p-32, v6e-16: makes the TPU VM where it is not there yet
  --version         its software (default: the one that suits --type)
  --spot            with --type: a spot VM; run this again after a preemption and training resumes where it was
  --detach          return at once; the log is ~/jaxalign/train.log on each worker
  --dry_run         say what would be called, and call nothing
  after --          the arguments of \`jaxalign train\`; a slice of several hosts needs --config.workdir=gs://...
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/say.sh
source "$root/launch/say.sh"
self=launch/${TPU_LAUNCHER:-tpu_pod.sh}
worker=${TPU_WORKER:-all}
name="" zone="" project="" type="" version="" spot="" detach=""
take_dry_run "$@"
set -- "${arguments[@]}"
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --detach) detach=1 ;;
    --) shift && break ;;
    *) usage >&2 && fail "argument '$1'" "the flags above, written --flag=value, then -- and the arguments of jaxalign train" "bash $self --name=NAME --zone=ZONE -- --config=FILE" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
  usage >&2
  fail "--name='$name' --zone='$zone'" "both" "bash $self --name=NAME --zone=us-east5-a -- --config=FILE"
fi
[ $# -gt 0 ] || fail "nothing after --" "the arguments of jaxalign train" "bash $self --name=$name --zone=$zone -- --config=configs/dpo.py"
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "no gcloud on the PATH" "the Google Cloud command line" "install it, then: gcloud auth login"
if [ "$worker" = all ]; then
  workdir=""
  for argument in "$@"; do
    case $argument in --config.workdir=*) workdir=${argument#*=} ;; esac
  done
  case $workdir in
    "" | gs://*) ;;
    *) fail "--config.workdir=$workdir on every host of a pod slice" "a place all hosts share" "--config.workdir=gs://BUCKET/DIR" ;;
  esac
fi

tpu() { ${dry_run:+would} gcloud compute tpus tpu-vm "$@" --zone="$zone" ${project:+"--project=$project"}; }

# A spot VM that was taken away is still listed, and its name is free only once it is deleted.
create=$dry_run
if [ -n "$type" ] && [ -z "$dry_run" ]; then
  state=$(tpu describe "$name" --format="value(state)" 2>/dev/null) || state=none
  case $state in
    none) create=1 ;;
    PREEMPTED | TERMINATED) tpu delete "$name" --quiet && create=1 ;;
  esac
fi
if [ -n "$type" ] && [ -n "$create" ]; then
  if [ -z "$version" ]; then
    case $type in
      v5lite*) version=v2-alpha-tpuv5-lite ;;
      v5p*) version=v2-alpha-tpuv5 ;;
      v6e*) version=v2-alpha-tpuv6e ;;
      *) version=tpu-ubuntu2204-base ;;
    esac
  fi
  if [ -n "$dry_run" ]; then echo "where $name is not there yet:"; fi
  tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
fi

# The tracked files and those git does not ignore; their permissions with them.
archive=$(mktemp -d)/jaxalign.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
[ -n "$dry_run" ] || (cd "$root" && git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
  tar --null --files-from=- -czf "$archive")
tpu scp "$archive" "$name:jaxalign.tar.gz" --worker="$worker"

pod=""
if [ "$worker" = all ]; then pod="JAXALIGN_TPU_POD=1 "; fi
start="${pod}PYTHONUNBUFFERED=1 .venv/bin/jaxalign train$(printf ' %q' "$@")"
if [ -n "$detach" ]; then start="{ nohup env $start > train.log 2>&1 < /dev/null & }"; fi
tpu ssh "$name" --worker="$worker" --command="set -e
mkdir -p jaxalign && tar -xzf jaxalign.tar.gz -C jaxalign && cd jaxalign
JAXALIGN_APT=1 JAXALIGN_ACCELERATOR=tpu bash launch/setup.sh
$start"

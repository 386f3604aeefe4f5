#!/usr/bin/env bash
# Makes or reuses .venv with jaxalign and its pinned dependencies. Needs Python 3.11 or newer and pip, nothing else.
# Safe to run twice: it returns at once where nothing has changed, and mends a half-made .venv.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/setup.sh [--dry_run | --check] [EXTRA ...]

  EXTRA       test, wandb, ... (pyproject.toml lists them); those of earlier calls are kept
  --dry_run   say what would be made and installed, and change nothing
  --check     change nothing, and fail where something would have to be installed: for nodes without internet

environment:
  JAXALIGN_VENV         where the virtual environment goes (default: .venv beside this checkout's README)
  JAXALIGN_ACCELERATOR  cpu, cuda, cuda12 or tpu (default: what this machine shows)
  JAXALIGN_APT          1: a missing Python may be installed with apt-get (the TPU launchers set it)
  PYTHON                the Python to use (default: the first of python3, python3.11, python3.12, python3.13, python3.14
                        that is new enough)

Without internet: make it beforehand where there is some, for the accelerator of the nodes, on a file system they share,
  JAXALIGN_ACCELERATOR=cuda bash launch/setup.sh
or carry the wheels there:
  python3.11 -m pip wheel --wheel-dir=/shared/wheels -c launch/constraints.txt '.[cuda]' 'setuptools>=77'
  PIP_NO_INDEX=1 PIP_FIND_LINKS=/shared/wheels bash launch/setup.sh
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/say.sh
source "$root/launch/say.sh"
venv=${JAXALIGN_VENV:-$root/.venv}
constraints=$root/launch/constraints.txt
stamp=$venv/jaxalign-setup.txt

# What this machine shows. nvidia-smi lists the GPUs; on WSL it lies off the PATH. TPUs are told by their PCI ids,
# as JAX itself does, or by the environment that GKE sets.
accelerator() {
  local smi=nvidia-smi version device vendor
  command -v "$smi" >/dev/null 2>&1 || smi=/usr/lib/wsl/lib/nvidia-smi
  if command -v "$smi" >/dev/null 2>&1 && "$smi" -L 2>/dev/null | grep -q '^GPU '; then
    version=$("$smi" 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1)
    if [ "${version:-13}" -ge 13 ]; then echo cuda; else echo cuda12; fi
    return
  fi
  if [ -n "${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_HOSTNAMES:-}" ]; then
    echo tpu
    return
  fi
  for device in "${JAXALIGN_PCI:-/sys/bus/pci/devices}"/*/; do
    vendor=$(cat "$device/vendor" 2>/dev/null || true)
    if [ "$vendor" = 0x1ae0 ]; then
      case $(cat "$device/device" 2>/dev/null || true) in
        0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076)
          echo tpu
          return
          ;;
      esac
    fi
  done
  echo cpu
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || fail "PYTHON=$PYTHON: $("$PYTHON" --version 2>&1 || true)" "Python 3.11 or newer" "PYTHON=python3.11 bash launch/setup.sh"
    command -v "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  if [ "${JAXALIGN_APT:-0}" = 1 ] && command -v apt-get >/dev/null; then
    sudo -n apt-get update -qq >&2 && sudo -n apt-get install -y -qq python3.11 python3.11-venv >&2 && command -v python3.11 && return
  fi
  fail "$(python3 --version 2>&1 || echo 'no Python')" "Python 3.11 or newer on the PATH" \
    "sudo apt-get install python3.11 python3.11-venv   (or: PYTHON=/path/to/python3.11 bash launch/setup.sh)"
}

mode=""
case ${1:-} in
  -h | --help) usage && exit 0 ;;
  --dry_run | --check) mode=$1 && shift ;;
esac
for extra in "$@"; do
  grep -Eq "^$extra = \[" "$root/pyproject.toml" || fail "extra '$extra'" \
    "one of $(sed -n '/^\[project.optional-dependencies\]/,/^\[project.scripts\]/s/^\([a-z0-9-]*\) = \[.*/\1/p' "$root/pyproject.toml" | tr '\n' ' ')" "bash launch/setup.sh test"
done
accelerator=${JAXALIGN_ACCELERATOR:-$(accelerator)}
case $accelerator in
  cpu) ;;
  cuda | cuda12 | tpu) set -- "$accelerator" "$@" ;;
  *) fail "JAXALIGN_ACCELERATOR=$accelerator" "cpu, cuda, cuda12 or tpu" "JAXALIGN_ACCELERATOR=cpu bash launch/setup.sh" ;;
esac

python=$venv/bin/python
if ! { new_enough "$python" && "$python" -m pip --version; } >/dev/null 2>&1; then
  if [ "$mode" = --check ]; then
    fail "no environment in $venv that works here" "one made beforehand, where there is internet" \
      "JAXALIGN_ACCELERATOR=$accelerator bash launch/setup.sh $*"
  elif [ "$mode" = --dry_run ]; then
    base=$(JAXALIGN_APT=0 find_python)
    would "$base" -m venv "$venv"
    would "$python" -m pip install -c "$constraints" -e "$root${*:+[$(IFS=,; echo "$*")]}"
    exit 0
  fi
  base=$(find_python)
  echo "jaxalign: making $venv with $("$base" --version)"
  rm -f "$stamp"
  "$base" -m venv "$venv" || fail "$base cannot make a virtual environment" "Python's venv module" "sudo apt-get install python3-venv"
fi

# The stamp: a fingerprint of what decides the installation, then the extras that are in.
fingerprint=$("$python" - "$root" "$constraints" <<'PY'
import hashlib, pathlib, sys
root, constraints = map(pathlib.Path, sys.argv[1:])
parts = [str(root), sys.version] + [p.read_text() for p in (root / "pyproject.toml", constraints)]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
)
installed=""
if [ -f "$stamp" ]; then installed=$(tail -n +2 "$stamp"); fi
extras=$(printf '%s\n' "$installed" "$@" | sed '/^$/d' | sort -u)
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$fingerprint" ] && [ "$extras" = "$installed" ]; then
  if [ "$mode" = --dry_run ]; then echo "nothing to install: $venv is up to date"; fi
  exit 0
fi

list=$(printf '%s' "$extras" | tr '\n' ',')
if [ "$mode" = --check ]; then
  fail "$venv was made for other extras or versions (now: ${list:-none})" "an environment made for this machine and checkout" \
    "where there is internet: JAXALIGN_ACCELERATOR=$accelerator bash launch/setup.sh"
elif [ "$mode" = --dry_run ]; then
  would "$python" -m pip install -c "$constraints" -e "$root${list:+[$list]}"
  exit 0
fi
echo "jaxalign: installing into $venv (extras: ${list:-none})"
rm -f "$stamp"
cd "$root"
"$python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".${list:+[$list]}" ||
  fail "pip could not install jaxalign" "the versions of launch/constraints.txt within pip's reach" \
    "the lines above say which package; behind a mirror set PIP_INDEX_URL, without internet see --help; then run this again"
{ echo "$fingerprint" && if [ -n "$extras" ]; then printf '%s\n' "$extras"; fi; } >"$stamp"

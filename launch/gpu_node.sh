#!/usr/bin/env bash
# Trains on one machine with all of its GPUs. One process drives them all (the default), or one process each, joined by
# jax.distributed, for setups that want it. Run again to resume.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash launch/gpu_node.sh [--processes=one|per-gpu] [--port=PORT] [--dry_run] [--] --config=FILE [--config.FIELD=VALUE ...]

  --processes=one       one process sees every GPU (default)
  --processes=per-gpu   one process for each GPU
  --port                of their meeting point, with per-gpu (default: 8476)
  --dry_run             say what would be installed and run, and do neither
  the rest              the arguments of `jaxalign train`

CUDA_VISIBLE_DEVICES chooses the GPUs; XLA_PYTHON_CLIENT_MEM_FRACTION is the share of their memory that programs may use
(default here: 0.92).
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/say.sh
source "$root/launch/say.sh"
take_dry_run "$@"
set -- "${arguments[@]}"
processes=one port=8476
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --processes=*) processes=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --) shift && break ;;
    *) break ;;
  esac
  shift
done
case $processes in one | per-gpu) ;; *) fail "--processes=$processes" "one or per-gpu" "bash launch/gpu_node.sh --processes=one --config=FILE" ;; esac
if [ $# -eq 0 ]; then
  usage >&2
  fail "no arguments for jaxalign train" "--config=FILE at least" "bash launch/gpu_node.sh --config=configs/dpo.py"
fi

bash "$root/launch/setup.sh" ${dry_run:+--dry_run}
give_gpu_memory
jaxalign=("${JAXALIGN_VENV:-$root/.venv}/bin/python" -m jaxalign train)
if [ -n "$dry_run" ]; then
  if [ "$processes" = per-gpu ]; then echo "once for each GPU of ${CUDA_VISIBLE_DEVICES:-nvidia-smi -L}, joined at localhost:$port:"; fi
  would "${jaxalign[@]}" "$@"
  exit 0
fi
[ "$processes" = per-gpu ] || exec "${jaxalign[@]}" "$@"

if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
else
  count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  [ "$count" -gt 0 ] || fail "nvidia-smi lists no GPU" "at least one" "bash launch/gpu_node.sh --processes=one --config=FILE   (runs on what JAX finds)"
  mapfile -t gpus < <(seq 0 $((count - 1)))
fi

children=()
stopping=""
stop() {
  [ -z "$stopping" ] || return 0
  stopping=1
  for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null || true; done
}
trap stop TERM INT
for index in "${!gpus[@]}"; do
  CUDA_VISIBLE_DEVICES=${gpus[$index]} JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=${#gpus[@]} \
    JAX_PROCESS_ID=$index "${jaxalign[@]}" "$@" &
  children+=("$!")
done

# The first process that fails ends the others, which would wait for it in a collective. A signal interrupts `wait`,
# so the loop asks which children are still there instead of counting returns.
status=0
while [ "${#children[@]}" -gt 0 ]; do
  left=()
  for child in "${children[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      left+=("$child")
      continue
    fi
    code=0
    wait "$child" || code=$?
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$code
      stop
    fi
  done
  children=("${left[@]}")
  sleep 0.2 || true
done
exit "$status"

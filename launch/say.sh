# shellcheck shell=bash
# Sourced by the launchers: an error in three parts, as jaxalign.errors.InputError prints it, what a dry run would do, and
# what programs on GPUs count on.

# fail FOUND EXPECTED FIX
fail() {
  printf 'found:    %s\nexpected: %s\nfix:      %s\n' "$1" "$2" "$3" >&2
  exit 2
}

# would COMMAND ARGUMENT...: the command, as a shell reads it.
would() {
  printf 'would run:'
  printf ' %q' "$@"
  printf '\n'
}

# take_dry_run ARGUMENT...: sets dry_run where --dry_run is among them, and arguments to the others. A launcher's dry run
# starts nothing, so the word counts wherever it stands; that of `jaxalign train` runs where the environment is at hand.
# shellcheck disable=SC2034  # both are read by who sources this
take_dry_run() {
  local argument
  dry_run="" arguments=()
  for argument in "$@"; do
    if [ "$argument" = --dry_run ]; then dry_run=1; else arguments+=("$argument"); fi
  done
}

# give_gpu_memory: lets JAX's pool have 92 % of each GPU, where the environment does not say how much; left to itself it
# takes 75 %. The rest is for what CUDA and NCCL take beside the pool.
give_gpu_memory() {
  [ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_PREALLOCATE:-}" ] || return 0
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
  echo "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92: the share of each GPU's memory that programs may use"
}

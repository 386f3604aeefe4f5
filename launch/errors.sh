# shellcheck shell=bash
# Sourced by the launchers: an error in three parts, as jaxalign.errors.InputError prints it.

# fail FOUND EXPECTED FIX
fail() {
  printf 'found:    %s\nexpected: %s\nfix:      %s\n' "$1" "$2" "$3" >&2
  exit 2
}

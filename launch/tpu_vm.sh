#!/usr/bin/env bash
# Trains on one Cloud TPU VM (a slice with one host, such as v5litepod-8 or v6e-8) from your own machine.
# The same as tpu_pod.sh for a single worker; --help lists the arguments.
set -euo pipefail
TPU_LAUNCHER=tpu_vm.sh TPU_WORKER=0 exec bash "$(dirname "${BASH_SOURCE[0]}")/tpu_pod.sh" "$@"

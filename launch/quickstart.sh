#!/usr/bin/env bash
# The main job: makes or reuses .venv, then aligns a small model in a small world from start to finish.
# Arguments go on to the quickstart; run with --help to see them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash launch/setup.sh
exec "${JAXALIGN_VENV:-.venv}/bin/python" -m jaxalign.pipeline.quickstart "$@"

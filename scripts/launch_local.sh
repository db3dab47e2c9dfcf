#!/usr/bin/env bash
# Trains with N processes on this machine's CPU:
#     bash scripts/launch_local.sh [--python python3.13] N [flags of scripts/train.py]
# DEVICES_PER_PROCESS=4 simulates four devices in each; a signal to this process goes to all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
take_python "$@"
set -- ${rest[@]+"${rest[@]}"}
use_environment "" "$python"
exec python "${from_here}scripts/launch_local.py" "$@"

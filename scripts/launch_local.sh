#!/usr/bin/env bash
# Trains with N processes on this machine's CPU: bash scripts/launch_local.sh N [flags of scripts/train.py]
# DEVICES_PER_PROCESS=4 simulates four devices in each; a signal to this one goes to all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment ""
exec python "${from_here}scripts/launch_local.py" "$@"

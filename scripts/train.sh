#!/usr/bin/env bash
# Trains: bash scripts/train.sh [flags of scripts/train.py]
# Without flags: configs/base.py on Python's standard library, into runs/base. Run again to go on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment ""

config="$(flag_value config "$@")"
if [ -z "$config" ]; then
  config="${from_here}configs/base.py"
  set -- --config "$config" "$@"
fi
if [ -z "$(flag_value workdir "$@")" ]; then
  set -- --workdir "${from_here}runs/$(basename "$config" .py)" "$@"
fi
exec python "${from_here}scripts/train.py" "$@"

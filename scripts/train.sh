#!/usr/bin/env bash
# Trains: bash scripts/train.sh [--python python3.13] [flags of scripts/train.py]
# Without flags: configs/base.py on Python's standard library, into runs/base. Run again to resume.
# With --workdir of an existing run, and without --config: the configuration of that run.
# With --size=auto --minutes=N or --config.train.tune, and without --config: into runs/auto.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
take_python "$@"
set -- ${rest[@]+"${rest[@]}"}
use_environment "" "$python"

config="$(flag_value config "$@")" size="$(flag_value size "$@")" workdir="$(flag_value workdir "$@")"
tune="$(flag_value config.train.tune "$@")"
is_run() { [ -f "$1/config.json" ] && [ -d "$1/checkpoints" ]; }
if [ -z "$config$tune" ] && [ "$size" != auto ] && ! is_run "${workdir/#\~/$HOME}"; then
  config="${from_here}configs/base.py"
  set -- --config "$config" "$@"
fi
if [ -z "$workdir" ]; then
  set -- --workdir "${from_here}runs/$(basename "${config:-auto}" .py)" "$@"
fi
exec python "${from_here}scripts/train.py" "$@"

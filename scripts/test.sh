#!/usr/bin/env bash
# Checks everything: bash scripts/test.sh [--python python3.13] [arguments of pytest]
# Linter, formatter, type checker and tests all run; any failure fails the whole.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
take_python "$@"
set -- ${rest[@]+"${rest[@]}"}
use_environment test "$python"
cd "$root"

sources=(simplernn_jax scripts configs tests)
status=0
ruff check "${sources[@]}" || status=1
ruff format --check "${sources[@]}" || status=1
mypy || status=1
python -m pytest -n 2 "$@" || status=1
exit "$status"

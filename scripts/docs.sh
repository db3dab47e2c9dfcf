#!/usr/bin/env bash
# Builds the documentation: bash scripts/docs.sh [--python python3.13]
# The pages are written to docs/_build; warnings are errors. No network is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
take_python "$@"
[ ${#rest[@]} -eq 0 ] || fail "${rest[0]}: the only argument is --python"
use_environment docs "$python"
cd "$root"
export JAX_PLATFORMS=cpu
python -m sphinx -n -W --keep-going -q docs docs/_build
echo "docs/_build/index.html"

#!/usr/bin/env bash
# Writes: bash scripts/infer.sh "prompt" [flags of scripts/sample.py]
# Without --workdir: with the model under runs/ that was saved last.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment ""

case "${1:---help}" in
  -h | --help) exec python "${from_here}scripts/sample.py" --help ;;
  -*) ;;
  *)
    prompt="$1"
    shift
    set -- --prompt="$prompt" "$@" ;;
esac
if [ -z "$(flag_value workdir "$@")" ]; then
  newest=""
  for checkpoints in "${from_here}runs"/*/checkpoints; do
    [ -d "$checkpoints" ] || continue
    if [ -z "$newest" ] || [ "$checkpoints" -nt "$newest" ]; then newest="$checkpoints"; fi
  done
  [ -n "$newest" ] || fail "nothing under ${from_here}runs is trained yet; run: bash scripts/train.sh"
  echo "model: $(dirname "$newest")" >&2
  set -- --workdir "$(dirname "$newest")" "$@"
fi
exec python "${from_here}scripts/sample.py" "$@"

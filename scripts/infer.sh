#!/usr/bin/env bash
# Writes: bash scripts/infer.sh "prompt" [flags of scripts/sample.py]
# Without --workdir: with the model under runs/ that was saved last.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment ""

case "${1--}" in # no argument, like flags alone: a new document
  -h | --help) exec python "${from_here}scripts/sample.py" --help ;;
  -*) ;;
  *)
    prompt="$1"
    shift
    set -- --prompt="$prompt" "$@" ;;
esac
if [ -z "$(flag_value workdir "$@")" ]; then
  newest=""
  for saved in "${from_here}runs"/*/checkpoints/complete.json; do
    if [ -e "$saved" ] && { [ -z "$newest" ] || [ "$saved" -nt "$newest" ]; }; then newest="$saved"; fi
  done
  [ -n "$newest" ] || fail "nothing under ${from_here}runs is trained yet; run: bash scripts/train.sh"
  workdir="${newest%/checkpoints/complete.json}"
  echo "model: $workdir" >&2
  set -- --workdir "$workdir" "$@"
fi
exec python "${from_here}scripts/sample.py" "$@"

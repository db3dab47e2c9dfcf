#!/usr/bin/env bash
# Generates: bash scripts/infer.sh [--python python3.13] "prompt" [flags of scripts/sample.py]
# Without --workdir: with the most recently saved model under runs/. A prompt that looks like a flag
# follows --.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
take_python "$@"
set -- ${rest[@]+"${rest[@]}"}
use_environment "" "$python"

flag='^--?[A-Za-z][A-Za-z0-9_.]*(=.*)?$'
case "${1-}" in
  -h | --help) exec python "${from_here}scripts/sample.py" --help ;;
  --) shift ;;
esac
if [ $# -gt 0 ] && { [ "${rest[0]}" = -- ] || ! [[ "$1" =~ $flag ]]; }; then
  prompt="$1"
  shift
  set -- --prompt="$prompt" "$@"
fi
if [ -z "$(flag_value workdir "$@")" ]; then
  newest=""
  for saved in "${from_here}runs"/*/checkpoints/*/manifest.sha256; do
    if [ -e "$saved" ] && { [ -z "$newest" ] || [ "$saved" -nt "$newest" ]; }; then newest="$saved"; fi
  done
  [ -n "$newest" ] || fail "no trained model under ${from_here}runs; run: bash scripts/train.sh"
  workdir="${newest%/checkpoints/*}"
  echo "model: $workdir" >&2
  set -- --workdir "$workdir" "$@"
fi
exec python "${from_here}scripts/sample.py" "$@"

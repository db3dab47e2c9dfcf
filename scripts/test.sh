#!/usr/bin/env bash
# Checks everything: bash scripts/test.sh [--python python3.13] [--all|--sanitize] [arguments of pytest]
# Linter, formatter, type checker and tests all run; any failure is an error.
# --all: also the slow tests; those of the recurrence and the train step run as XLA optimizes them.
# --sanitize: only the tests of the C functions, built with gcc's address and undefined-behavior
# sanitizers: the first finding ends the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
all="" sanitize=""
take_python "$@"
set -- ${rest[@]+"${rest[@]}"}
case "${1:-}" in
  --all) all=yes && shift ;;
  --sanitize) sanitize=yes && shift ;;
esac
use_environment test "$python"
cd "$root"

if [ -n "$sanitize" ]; then
  compiler="${CC:-gcc}"
  # Python is not built with the sanitizer, so its libraries are preloaded.
  for library in libasan.so libstdc++.so; do
    path="$($compiler -print-file-name="$library" 2>/dev/null || true)"
    [ -e "$path" ] || fail "--sanitize: $compiler has no $library; install gcc with its sanitizers"
    preload="${preload:+$preload }$path"
  done
  of_c=(native gated_linear_recurrence newton_schulz rms_norm)
  set -- $(printf 'tests/ops/test_%s.py ' "${of_c[@]}") tests/inference/test_native_decoding.py "$@"
  export CC="$compiler -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
  export ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0" # Python frees little at exit
  # No other allocator: it would hide out-of-bounds writes.
  env -u GLIBC_TUNABLES LD_PRELOAD="$preload" python -m pytest -n 2 "$@"
  exit
fi

sources=(simplernn_jax scripts benchmarks configs docs tests)
status=0
ruff check "${sources[@]}" || status=1
ruff format --check "${sources[@]}" || status=1
mypy & # on one core, while tests wait for others
types=$!
[ -n "$all" ] || [ $# -gt 0 ] || set -- -m "not slow"
run=(python -m pytest -n 2 --dist loadfile "$@")
optimized=(tests/ops/test_gated_linear_recurrence.py tests/training/test_train_step.py)
if [ -n "$all" ]; then
  DEFAULT_XLA_FLAGS=1 "${run[@]}" "${optimized[@]}" || status=1
  run+=("${optimized[@]/#/--ignore=}")
fi
"${run[@]}" --no-loadscope-reorder || status=1
wait "$types" || status=1
exit "$status"

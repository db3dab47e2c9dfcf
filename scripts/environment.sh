# Sourced by the launchers. After use_environment, `python` is the virtual environment's, with the
# project installed; the first call creates the environment, later ones take a moment.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ "$PWD" = "$root" ] && from_here="" || from_here="$root/" # short paths where they suffice

# Without these, a Python that is interrupted below would look like one that does not work.
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
  echo "error: $*" >&2
  exit 2
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_suitable() {
  case "$(version_of "$1")" in
    3.11 | 3.12 | 3.13) "$1" -c 'import ensurepip, venv' 2>/dev/null ;;
    *) return 1 ;;
  esac
}

find_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if is_suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  for candidate in python3.11 python3.12 python3.13 python3; do
    case "$(version_of "$candidate")" in
      3.11 | 3.12 | 3.13)
        fail "$candidate cannot create virtual environments; install its venv module" \
          "(Debian and Ubuntu: apt install python$(version_of "$candidate")-venv)" ;;
    esac
  done
  fail "no Python 3.11, 3.12 or 3.13 on the PATH; install one of them"
}

# take_python ARGUMENTS...: set `python` to the value of --python, or empty; `rest` to all else.
take_python() {
  python="" rest=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --) break ;;
      --python=*) python="${1#*=}" ;;
      --python)
        python="${2:-}"
        [ -n "$python" ] || fail "--python: specify an interpreter, such as python3.13"
        shift ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  [ $# -eq 0 ] || rest+=("$@")
}

# use_environment EXTRA [PYTHON]: activate .venv with the first suitable interpreter, or .venv-3.13
# etc. with PYTHON. EXTRA is empty or an extra of pyproject.toml.
use_environment() {
  local extra="$1" python="${2:-}" venv="$root/.venv" wanted
  if [ -n "$python" ]; then
    is_suitable "$python" || fail "--python $python: not a Python 3.11 to 3.13 with its venv module"
    venv="$root/.venv-$(version_of "$python")"
  fi
  if ! version_of "$venv/bin/python" >/dev/null; then
    python="${python:-$(find_python)}" || exit
    rm -rf "$venv"
    "$python" -m venv "$venv"
  fi
  # The stamp holds what an installation depends on; it is written when the installation is complete.
  wanted="$("$venv/bin/python" -VV; echo "$root"; cat "$root/pyproject.toml")"
  if [ "$wanted" != "$(cat "$venv/installed-$extra" 2>/dev/null)" ]; then
    echo "Installing simplernn_jax into $venv (minutes the first time, seconds from then on)." >&2
    # Those of other extras stay valid, unless the dependencies changed.
    [ "$wanted" = "$(cat "$venv/installed-" 2>/dev/null)" ] || rm -f "$venv"/installed-*
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -e "$root${extra:+[$extra]}" >&2
    printf '%s\n' "$wanted" | tee "$venv/installed-" >"$venv/installed-$extra"
  fi
  export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}

# flag_value NAME ARGUMENTS...: print the value of --NAME among the arguments, or nothing.
flag_value() {
  local name="$1" value=""
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      "--$name="* | "-$name="*) value="${1#*=}" ;;
      "--$name" | "-$name") value="${2:-}" ;;
    esac
    shift
  done
  printf '%s' "$value"
}

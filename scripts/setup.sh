# Sourced by the other scripts: a virtual environment in .venv with the pinned versions, made once.
# Sets PYTHON to its interpreter; `ask` prints a command and runs it.
# Set EXTRAS (e.g. dev) before sourcing to install an extra too.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3.10 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.10 to 3.14 is needed; found $(python3 --version 2>&1 || echo none)." \
        "Name one with PYTHON=/path/to/python." >&2
    return 1
}

base_python="$(find_python)" || exit 1
# The mark names what was installed, so that a changed pin or extra installs anew.
wanted="$(cat constraints.txt pyproject.toml <(echo "${EXTRAS:-}") | cksum | cut -d' ' -f1)"
mark=".venv/.installed-${EXTRAS:-base}"

if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$wanted" ]; then
    echo "== installing into .venv with $base_python (once; a few minutes)"
    [ -x .venv/bin/python ] || "$base_python" -m venv .venv
    # torch is named with its version, or pip may take a build for hardware that is not here.
    torch_pin="$(grep '^torch==' constraints.txt)"
    .venv/bin/python -m pip install --progress-bar off -q -c constraints.txt "$torch_pin" -e ".${EXTRAS:+[$EXTRAS]}"
    echo "$wanted" >"$mark"
elif [ -z "${FEDLLAVA_READY:-}" ]; then
    echo "== using .venv as it is"
fi
PYTHON="$ROOT/.venv/bin/python"
export PYTHON PATH="$ROOT/.venv/bin:$PATH" FEDLLAVA_READY=1

ask() { # print a command as one would type it, then run it
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

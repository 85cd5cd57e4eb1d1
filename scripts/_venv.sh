# Sourced by the scripts beside it. `use_venv EXTRAS` makes sure that .venv beside the project holds the project
# with these extras (comma-separated, may be empty). Sets PROJECT (its folder) and PYTHON (the interpreter in .venv).

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$PROJECT/.venv
PYTHON=$VENV/bin/python

base_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.10 or newer with the venv module found; install one, with its venv package, and try again" >&2
    return 1
}

use_venv() {
    local extras=$1 base state
    local stamp="$VENV/.installed-${extras:-base}"
    # An editable install points at the project's folder, so a moved checkout is installed anew.
    state="$PROJECT $(cksum <"$PROJECT/pyproject.toml")"
    if [[ -x $PYTHON && -f $stamp && $(<"$stamp") == "$state" ]]; then
        return
    fi
    if [[ ! -x $PYTHON ]]; then
        base=$(base_python)
        echo "making $VENV with $base"
        "$base" -m venv --clear "$VENV"
    fi
    # A creation that was interrupted leaves an interpreter without pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >/dev/null
    echo "installing the project into $VENV (minutes the first time)"
    (cd "$PROJECT" && "$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}")
    printf '%s\n' "$state" >"$stamp"
}

# Sourced by the scripts beside it. `use_venv EXTRAS [FOLDER [REQUIREMENT...]]` takes the active environment where it
# has the project with these extras (comma-separated, may be empty); else, and wherever FOLDER is named, it makes sure
# that FOLDER beside the project (default .venv) holds them and what else pip is to install. With --help among the
# script's arguments it installs nothing. Sets PROJECT (the project's folder) and PYTHON (the interpreter).

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONS=(python3 python3.13 python3.12 python3.11 python3.10) # to make it with; the first that is there and new enough

HELP=
for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then HELP=yes; fi
done

# The interpreter of the active environment, where that is enough; run from elsewhere, since here `import logart` works.
active_python() {
    local candidate
    for candidate in python3 python; do
        if (cd / && "$candidate" "$PROJECT/scripts/_active.py" "$1") 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# What a script without flags of its own answers to --help: the comment at its head.
explain() {
    if [[ -n $HELP ]]; then
        while IFS= read -r line && [[ $line == \#* ]]; do
            if [[ $line != \#!* ]]; then echo "${line#\# }"; fi
        done <"$0"
        exit 0
    fi
}

base_python() {
    local candidate
    for candidate in "${PYTHONS[@]}"; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.10 or newer with the venv module found among: ${PYTHONS[*]}; install one, with its venv package," \
        "and try again" >&2
    return 1
}

use_venv() {
    local extras=$1 venv=$PROJECT/${2:-.venv} base state
    local stamp="$venv/.installed-${extras:-base}"
    if [[ $# == 1 ]] && PYTHON=$(active_python "$extras"); then
        return
    fi
    PYTHON=$venv/bin/python
    if [[ -n $HELP ]]; then # needs nothing but Python's own library
        if [[ ! -x $PYTHON ]]; then PYTHON=$(base_python); fi
        export PYTHONPATH=$PROJECT
        return
    fi
    # An editable install points at the project's folder, so a moved checkout is installed anew.
    state="$PROJECT $(cksum <"$PROJECT/pyproject.toml")${*:3}"
    if [[ -x $PYTHON && -f $stamp && $(<"$stamp") == "$state" ]]; then
        return
    fi
    if [[ ! -x $PYTHON ]]; then
        base=$(base_python)
        echo "making $venv with $base"
        "$base" -m venv --clear "$venv"
    fi
    # A creation that was interrupted leaves an interpreter without pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --upgrade >/dev/null
    echo "installing the project into $venv (minutes the first time)"
    local install=("$PYTHON" -m pip install --quiet --disable-pip-version-check)
    (cd "$PROJECT" && "${install[@]}" -e ".${extras:+[$extras]}" "${@:3}")
    printf '%s\n' "$state" >"$stamp"
}

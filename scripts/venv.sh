# Functions for the other scripts, which source this file.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer is needed; \`$python\` is not. Set PYTHON=/path/to/python3." >&2
    exit 1
fi

# new_venv FOLDER: create an empty virtual environment.
new_venv() {
    rm -rf "$1"
    if ! "$python" -m venv "$1"; then
        echo "\`$python -m venv\` failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
}

# make_venv FOLDER REQUIREMENT CONSTRAINTS: create a virtual environment with this package and the exact versions
# in the file CONSTRAINTS. Reuse the existing one if it was created from the same files with the same Python.
make_venv() {
    stamp="$1/.made-from"
    made_from=$("$python" --version; cat pyproject.toml "$3"; echo "$2")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; then
        return
    fi
    echo "Creating $1 with $("$python" --version). The first time, this downloads PyTorch ..." >&2
    new_venv "$1"
    # Unlike -c, the variable overrides a constraint file that pip's own configuration names.
    PIP_CONSTRAINT=$3 "$1/bin/python" -m pip install --quiet --disable-pip-version-check -e "$2"
    printf '%s\n' "$made_from" > "$stamp"
}

# resolve FILE OPTION...: write the exact versions that uv resolves for the tests to FILE.
resolve() {
    resolved=$1
    shift
    if [ ! -x .venv-uv/bin/uv ]; then
        new_venv .venv-uv
        .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    fi
    .venv-uv/bin/uv pip compile --quiet --upgrade --no-annotate --extra dev "$@" -o "$resolved" pyproject.toml
}

# Sourced by the other scripts.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer is needed; \`$python\` is not. Set PYTHON=/path/to/python3." >&2
    exit 1
fi

# new_venv FOLDER: make an empty virtual environment.
new_venv() {
    rm -rf "$1"
    if ! "$python" -m venv "$1"; then
        echo "\`$python -m venv\` failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
}

# make_venv FOLDER REQUIREMENT CONSTRAINTS: make a virtual environment with this package and the exact versions
# in the file CONSTRAINTS, or reuse one that was made from the same files with the same Python.
make_venv() {
    stamp="$1/.made-from"
    made_from=$("$python" --version; cat pyproject.toml "$3"; echo "$2")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; then
        return
    fi
    echo "Making $1 with $("$python" --version); the first time this downloads PyTorch ..." >&2
    new_venv "$1"
    # The variable, unlike -c, takes the place of a constraint in pip's own configuration.
    PIP_CONSTRAINT=$3 "$1/bin/python" -m pip install --quiet --disable-pip-version-check -e "$2"
    printf '%s\n' "$made_from" > "$stamp"
}

# resolve FILE OPTION...: write the exact versions that uv chooses for the tests to FILE.
resolve() {
    resolved=$1
    shift
    if [ ! -x .venv-uv/bin/uv ]; then
        new_venv .venv-uv
        .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    fi
    .venv-uv/bin/uv pip compile --quiet --upgrade --no-annotate --extra dev "$@" -o "$resolved" pyproject.toml
}

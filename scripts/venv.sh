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

# make_venv FOLDER CONSTRAINTS ARGUMENT...: make a virtual environment in FOLDER and run `pip install ARGUMENT...`
# in it, with the exact versions in the file CONSTRAINTS. A virtual environment that was made from the same files
# with the same Python is used again.
make_venv() {
    folder=$1
    constraints_file=$2
    shift 2
    made_from=$("$python" --version; cat pyproject.toml "$constraints_file"; echo "$*")
    if [ -f "$folder/.made-from" ] && [ "$(cat "$folder/.made-from")" = "$made_from" ]; then
        return
    fi
    echo "Making $folder with $("$python" --version); the first time this downloads its packages ..." >&2
    new_venv "$folder"
    # PIP_CONSTRAINT replaces a constraint in pip's own configuration; the option -c would add to it.
    PIP_CONSTRAINT=$constraints_file "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    printf '%s\n' "$made_from" > "$folder/.made-from"
}

# resolve FILE OPTION...: write the exact versions that uv resolves for the tests to FILE.
resolve() {
    resolved=$1
    shift
    if [ ! -x .venv-uv/bin/uv ]; then
        new_venv .venv-uv
        .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    fi
    .venv-uv/bin/uv pip compile --quiet --upgrade --no-annotate --extra dev --extra docs "$@" -o "$resolved" pyproject.toml
}

# Sourced by the other scripts: make_venv FOLDER REQUIREMENT makes a virtual environment with this package
# and its exact, tested dependencies, or reuses one that was made from the same files.

make_venv() {
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed; \`$python\` is not. Set PYTHON=/path/to/python3." >&2
        exit 1
    fi
    stamp="$1/.made-from"
    made_from=$(cat pyproject.toml constraints.txt; echo "$2")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; then
        return
    fi
    echo "Making $1 with $("$python" --version); the first time this downloads PyTorch ..." >&2
    rm -rf "$1"
    if ! "$python" -m venv "$1"; then
        echo "\`$python -m venv\` failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$2"
    printf '%s\n' "$made_from" > "$stamp"
}

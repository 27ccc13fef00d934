# Sourced by the recipes: makes or reuses the virtual environment and puts it on PATH.
# VENV chooses its folder (default .venv); PYTHON the interpreter that makes it.
# DRY_RUN=1: the recipe prints its commands, ready to be typed, and runs and installs nothing.
if [ "${DRY_RUN:-0}" = 0 ]; then unset DRY_RUN; fi
if [ -n "${DRY_RUN:-}" ]; then
    show() { printf '%q ' "$@"; echo; }
    python() { show python "$@"; }
    torchrun() { show torchrun "$@"; }
    accelerate() { show accelerate "$@"; }
    ruff() { show ruff "$@"; }
    mkdir() { show mkdir "$@"; }
    mv() { show mv "$@"; }
    cat() { :; } # a recipe's last words tell of results
    exec() { "$@"; } # it would look past the functions
    need() { :; }
    export -f show python torchrun accelerate
    return
fi
need() { # VARIABLE FILE: stop if it is missing, before hours of work that want it at their end
    [ -e "$2" ] || { echo "error: $1=$2: no such file" >&2; exit 2; }
}
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
STAMP="$VENV/.installed-$(cksum < requirements.txt | tr ' ' '-')"

if [ ! -e "$STAMP" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $PYTHON is older than 3.11; set PYTHON to a newer one" >&2
        exit 1
    }
    echo "== installing requirements.txt into $VENV (about 3 minutes, 2 GB)"
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/pip" install -r requirements.txt
    rm -f "$VENV"/.installed-*
    touch "$STAMP"
fi
export PATH="$PWD/$VENV/bin:$PATH"
case "$VENV" in /*) export PATH="$VENV/bin:$PATH" ;; esac

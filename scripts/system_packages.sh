#!/bin/sh
# Looks for the system's libraries or programs that pip cannot bring, and installs those that are missing where it can.
# Usage: scripts/system_packages.sh runtime|test PYTHON
#   runtime  libraries that Open3D and OpenCV load; without them nothing works, so a failure is an error
#   test     programs that some tests use (promtool, chromium); without them those tests are skipped
set -eu

part=$1
python=${2:-python3}

fail() {
    echo "system packages: $*" >&2
    exit 1
}

# Is there a shared library of this name? Asked of the loader itself.
loads() { "$python" -c "import ctypes, sys; ctypes.CDLL(sys.argv[1])" "$1" 2>/dev/null; }

# Install Debian packages; services that they bring are not started.
install_packages() {
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    output=$(mktemp)
    for _ in 1 2; do
        if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >"$output" 2>&1
        then
            rm -f "$output"
            return 0
        fi
    done
    tail -n 20 "$output" >&2
    rm -f "$output"
    return 1
}

# All those missing are collected first, so that one command installs them.
missing=""
case $part in
runtime)
    [ "$(uname -s)" = Linux ] || exit 0
    command -v "$python" >/dev/null 2>&1 || fail "$python is not installed; name another with: make PYTHON=python3.12 ..."
    loads libusb-1.0.so.0 || missing="$missing libusb-1.0-0"
    loads libGL.so.1 || missing="$missing libgl1"
    loads libgomp.so.1 || missing="$missing libgomp1"
    loads libgthread-2.0.so.0 || missing="$missing libglib2.0-0"
    ;;
test)
    command -v promtool >/dev/null 2>&1 || missing="$missing prometheus"
    command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
    command -v nginx >/dev/null 2>&1 || missing="$missing nginx-light"
    command -v curl >/dev/null 2>&1 || missing="$missing curl"
    ;;
*) fail "say runtime or test, not '$part'" ;;
esac
[ -n "$missing" ] || exit 0

by_hand="apt-get update && apt-get install -y --no-install-recommends$missing"
why_not=""
command -v apt-get >/dev/null 2>&1 || why_not="there is no apt-get here; install what corresponds to Debian's$missing"
[ -n "$why_not" ] || [ "$(id -u)" = 0 ] || why_not="only root may install them; run: sudo sh -c '$by_hand'"
if [ -z "$why_not" ]; then
    echo "system packages: installing$missing"
    # shellcheck disable=SC2086  # a list of names, meant to be split
    install_packages $missing || why_not="installing them failed; by hand: $by_hand"
fi
[ -n "$why_not" ] || exit 0
if [ "$part" = runtime ]; then fail "missing$missing: $why_not"; fi
echo "system packages: without$missing the tests that need them are skipped: $why_not"

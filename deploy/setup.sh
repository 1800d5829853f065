#!/usr/bin/env bash
# Brings a fresh Debian 12 or Ubuntu 24.04 to the point where everything runs. Each step leaves a stamp that names what it
# was made from, so a second run only compares. It may be interrupted anywhere: what has no stamp is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
stamps=build/stamps policy=/usr/sbin/policy-rc.d policy_mark='# made by isthmus while packages are installed'
cannot_write="cannot write to $PWD: run as its owner"

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2; exit 2; }

# show TEXT LOG COMMAND...: run COMMAND with its output in LOG; say TEXT, on a terminal with the seconds that passed.
show() {
    local text=$1 log=$2 code=0
    shift 2
    SECONDS=0
    say "$text"
    if [ -t 1 ]; then
        (while sleep 1 && kill -0 $$; do printf '\r[setup] %d s ' "$SECONDS"; done) &
        ticker=$!
    fi
    "$@" > "$log" 2>&1 < /dev/null || code=$?
    stop_ticker
    [ "$code" -eq 0 ] || { tail -n 20 "$log" >&2; fail "$text: failed; all of its output is in $log"; }
    say "done in $SECONDS s"
}

ticker=
stop_ticker() {
    [ -z "$ticker" ] && return
    kill "$ticker" 2> /dev/null || true
    wait "$ticker" 2> /dev/null || true
    ticker=
    printf '\r'
}

forget_policy() { if grep -qsF "$policy_mark" "$policy"; then rm -f "$policy"; fi; }
trap 'stop_ticker; forget_policy' EXIT

install_packages() {
    local package missing=()
    command -v apt-get > /dev/null || fail "this is not Debian or Ubuntu: install by hand what deploy/packages.txt lists"
    while read -r package; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2> /dev/null || true)" = installed ] || missing+=("$package")
    done < <(grep -vE '^\s*(#|$)' deploy/packages.txt)
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" -eq 0 ] || fail "these packages are missing and installing them needs root: ${missing[*]}"
    # Daemons among the peers (nginx, haproxy, dnsmasq) are started by tests only, in namespaces of theirs.
    forget_policy
    [ -e "$policy" ] || { printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" > "$policy"; chmod 755 "$policy"; }
    show "installing ${#missing[@]} system packages: ${missing[*]}" build/apt.log apt_install "${missing[@]}"
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    # After an interrupted run dpkg refuses everything until it was let finish; it is a matter of milliseconds otherwise.
    dpkg --configure -a
    # One broken source among several is no reason to stop: what is really missing fails in the next line.
    apt-get update -qq || true
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}

# An environment is made from nothing: so it holds what the lock file says, whatever happened to the one before.
make_environment() {
    local python
    for python in python3 /usr/bin/python3 none; do
        "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && break
    done
    [ "$python" != none ] || fail "Python 3.11 or newer with its venv module is needed; python3 is $(python3 -V 2>&1)"
    rm -f "$stamps/project"
    show "making the Python environment" build/venv.log "$python" -m venv --clear .venv
    show "installing locked Python packages" build/pip.log pip_install --require-hashes -r requirements.lock
}

install_project() { show "installing isthmus into it" build/project.log pip_install --no-deps --no-build-isolation -e .; }

pip_install() { .venv/bin/python -m pip install -q --disable-pip-version-check "$@"; }

build_bpf() {
    local source
    mkdir -p build/bpf
    for source in bpf/*.bpf.c; do
        say "compiling $source"
        clang -O2 -g -target bpf -mcpu=v3 -Wall -Werror -Ibpf -c "$source" -o "build/bpf/$(basename "${source%.c}").o"
    done
}

# step NAME FUNCTION FILES...: run FUNCTION unless the files, and the place of this directory, are what they were when it
# last succeeded. (Scripts of a Python environment hold its path: a directory that was moved needs a new one.)
step() {
    local name=$1 function=$2 now
    shift 2
    now=$({ pwd; cat -- "$@"; } | sha256sum)
    if [ "$(cat "$stamps/$name" 2> /dev/null || true)" = "$now" ]; then return 0; fi
    [ -w "$stamps" ] || fail "$cannot_write"
    rm -f "$stamps/$name"
    "$function"
    printf '%s' "$now" > "$stamps/$name"
}

mkdir -p "$stamps" 2> /dev/null || fail "$cannot_write"
# Two at a time: the second waits, and then has nothing to do.
exec 9< "$stamps"
flock 9
# The interpreter of the system may have gone, or have become a newer one, since the environment was made.
interpreter=$(readlink -e .venv/bin/python || true)
case ${interpreter##*/} in
    python3.*) [ -d ".venv/lib/${interpreter##*/}" ] || rm -f "$stamps/environment" ;;
    '') rm -f "$stamps/environment" ;;
esac
shopt -s nullglob
step packages install_packages deploy/packages.txt
step environment make_environment requirements.lock
step project install_project pyproject.toml
step bpf build_bpf deploy/setup.sh bpf/*.c bpf/*/*.h

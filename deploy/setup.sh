#!/usr/bin/env bash
# Brings a fresh Debian 12 or Ubuntu 24.04 to the point where everything runs. Each step leaves a stamp that names what it
# was made from, so a second run only compares.
set -euo pipefail
cd "$(dirname "$0")/.."
stamps=build/stamps
mkdir -p "$stamps"

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }

install_packages() {
    local wanted missing=()
    wanted=$(grep -vE '^\s*(#|$)' deploy/packages.txt)
    for package in $wanted; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        if [ "$(id -u)" -ne 0 ]; then
            echo "these packages are missing and installing them needs root: ${missing[*]}" >&2
            exit 2
        fi
        say "installing ${#missing[@]} system packages: ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        # Daemons among the peers (nginx, haproxy, dnsmasq) are started by tests only, in namespaces of theirs.
        local policy=/usr/sbin/policy-rc.d made_policy=
        if [ ! -e "$policy" ]; then printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod 755 "$policy"; made_policy=1; fi
        local code=0
        apt-get install -y -qq --no-install-recommends "${missing[@]}" > build/apt.log 2>&1 || code=$?
        if [ -n "$made_policy" ]; then rm -f "$policy"; fi
        if [ "$code" -ne 0 ]; then tail -n 20 build/apt.log >&2; exit "$code"; fi
    fi
}

install_python() {
    if [ ! -x .venv/bin/python ]; then
        say "making the Python environment"
        local python
        for python in python3 /usr/bin/python3; do
            "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
        "$python" -m venv .venv
    fi
    say "installing locked Python packages"
    .venv/bin/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
    .venv/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
}

build_bpf() {
    local source
    for source in bpf/*.bpf.c; do
        [ -e "$source" ] || continue
        say "compiling $source"
        mkdir -p build/bpf
        clang -O2 -g -target bpf -mcpu=v3 -Wall -Werror -Ibpf -c "$source" -o "build/bpf/$(basename "${source%.c}").o"
    done
}

# step NAME FUNCTION FILES...: run FUNCTION unless the files are what they were when it last succeeded.
step() {
    local name=$1 function=$2 now
    shift 2
    now=$(cat -- "$@" 2>/dev/null | sha256sum)
    if [ "$(cat "$stamps/$name" 2>/dev/null || true)" = "$now" ]; then return 0; fi
    "$function"
    printf '%s' "$now" > "$stamps/$name"
}

[ -x .venv/bin/python ] || rm -f "$stamps/python"
step packages install_packages deploy/packages.txt deploy/setup.sh
step python install_python requirements.lock pyproject.toml
shopt -s nullglob
step bpf build_bpf bpf/*.c bpf/*/*.h deploy/setup.sh

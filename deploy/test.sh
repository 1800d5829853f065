#!/usr/bin/env bash
# Every test, cheapest first. Ends with pytest's own closing line.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '\033[1m[test]\033[0m %s\n' "$*"; }
say "format and style"
.venv/bin/ruff format -q --check .
.venv/bin/ruff check -q .
say "order of the rooms"
.venv/bin/lint-imports > build/imports.log || { cat build/imports.log; exit 1; }
say "types"
.venv/bin/mypy
say "unit tests"
.venv/bin/python -m pytest tests/unit -q -n 2
suites=()
for suite in bpf lab guest; do
    compgen -G "tests/$suite/**/test_*.py" > /dev/null || compgen -G "tests/$suite/test_*.py" > /dev/null || continue
    suites+=("tests/$suite")
done
if [ ${#suites[@]} -gt 0 ]; then
    say "kernel and lab tests"
    .venv/bin/python -m pytest "${suites[@]}" -q --durations=8
fi

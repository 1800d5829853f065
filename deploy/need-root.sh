#!/usr/bin/env bash
# One line that says what needs root, instead of a failure in the middle.
[ "$(id -u)" -eq 0 ] && exit 0
echo "$1, which needs root: run it with sudo. 'make unit' needs no root." >&2
exit 2

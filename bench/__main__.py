"""``python -m bench [NAME ...]``: every module here that has ``rows``, or those named. Exit 1: a target was missed."""

import sys

from rich.console import Console

from bench.harness import as_row, modules, show


def main(wanted: list[str]) -> int:
    """Run, print, judge."""
    met, ran = True, set()
    for name, module in modules(wanted):
        ran.add(name)
        with Console(stderr=True).status(f"measuring {name}"):
            rows = [as_row(row) for row in module.rows()]
        met &= show(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}", rows)
    for name in set(wanted) - ran:
        print(f"no benchmark is called {name}", file=sys.stderr)
    return 2 if set(wanted) - ran else int(not met)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

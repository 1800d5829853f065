"""What the benchmarks share: interleaved runs, medians, rows with their targets, the table, versions of peers."""

import importlib
import pkgutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import bench


class Row(NamedTuple):
    """One measured ratio. ``target`` None: reported, not judged. ``at_most``: smaller is better."""

    title: str
    value: float
    detail: str
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is reached, where there is one."""
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target


Way = Callable[[], float]


def interleave(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Run every way once a round, so that what else the machine does hits all alike; the figures by way."""
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            runs[name].append(way())
    return runs


def medians(runs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each way's runs."""
    return {name: statistics.median(values) for name, values in runs.items()}


def version(*command: str) -> str:
    """The first line that a peer prints about itself."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def modules(wanted: Sequence[str]) -> Iterable[tuple[str, Any]]:
    """The modules of this package that have ``rows``, by name; only ``wanted`` ones if any are given."""
    for found in pkgutil.iter_modules(bench.__path__):
        if (not wanted or found.name in wanted) and not found.name.startswith("_"):
            module = importlib.import_module(f"bench.{found.name}")
            if hasattr(module, "rows"):
                yield found.name, module


def as_row(given: Row | tuple[Any, ...]) -> Row:
    """A module may yield plain tuples: (title, value, detail[, target[, at_most]])."""
    return given if isinstance(given, Row) else Row(*given)


def show(title: str, rows: Iterable[Row]) -> bool:
    """Print one module's rows; whether all targets were met."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in (("", "left"), ("measured", "right"), ("target", "right"), ("figures", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    met = True
    for row in rows:
        met &= row.met
        target = "" if row.target is None else f"{'≤' if row.at_most else '≥'} {row.target:g}"
        colour = "" if row.target is None else ("green" if row.met else "red")
        table.add_row(row.title, f"[{colour}]{row.value:.3g}[/]" if colour else f"{row.value:.3g}", target, row.detail)
    Console(width=160).print(table)
    return met

"""Printing: tables for people, JSON and YAML for programs. The fields of both are those of wire/local.py.

No cell is cut short. On a terminal that is too narrow the columns that matter least are left out, and it is said which;
in a pipe every line is as long as it must be. Colours are for terminals only.
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from isthmus.cli.options import Format, TextFormat
from isthmus.model.errors import UsageError

Row = TypeVar("Row", bound=msgspec.Struct)


class Column(NamedTuple, Generic[Row]):
    """A column of a table: its heading, and the text of its cell.

    ``spare``: on a narrow terminal the columns with the highest number go first; 0 always stays.
    """

    heading: str
    cell: Callable[[Row], str]
    right: bool = False
    spare: int = 0


def sort_rows(rows: Sequence[Row], row_type: type[Row], key: str) -> list[Row]:
    """``rows`` by one of their fields, equal ones in the order they had. Raises UsageError for an unknown field."""
    fields = row_type.__struct_fields__
    field = key.strip().lower().replace("-", "_")
    if field not in fields:
        raise UsageError(f"there is no column “{key}” to sort by", hint=f"columns: {', '.join(fields)}")
    return sorted(rows, key=lambda row: _sort_key(getattr(row, field)))


def _sort_key(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else value


def print_rows(rows: Sequence[Row], columns: Sequence[Column[Row]], output: Format, *, empty: str) -> None:
    """Print ``rows`` in the wanted form; a table without rows is the sentence ``empty``."""
    if output is not Format.TABLE:
        print_value(rows, TextFormat(output.value))
    elif not rows:
        print(empty)
    elif sys.stdout.isatty():
        _print_fitting(rows, columns, terminal_width())
    else:
        _print_table(columns, _cells(rows, columns))


def _cells(rows: Sequence[Row], columns: Sequence[Column[Row]]) -> list[list[str]]:
    return [[column.cell(row) or "-" for column in columns] for row in rows]


def _widths(columns: Sequence[Column[Row]], cells: Sequence[Sequence[str]]) -> list[int]:
    headings = [column.heading for column in columns]
    return [max(map(len, texts)) for texts in zip(headings, *cells, strict=True)]


def _print_table(columns: Sequence[Column[Row]], cells: Sequence[Sequence[str]]) -> None:
    """One line a row however long, two blanks between columns, none at the end."""
    widths = _widths(columns, cells)
    for index, row in enumerate([[column.heading for column in columns], *cells]):
        aligned = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        line = "  ".join(aligned).rstrip()
        print(styled(line, "title") if index == 0 else line)


def _print_fitting(rows: Sequence[Row], columns: Sequence[Column[Row]], width: int) -> None:
    shown = fitting(rows, columns, width)
    cells = _cells(rows, shown)
    if _natural_width(shown, cells) <= width:
        _print_table(shown, cells)
    else:
        _print_folded(shown, cells)
    if left_out := [column.heading for column in columns if column not in shown]:
        print(styled(f"not shown at this width: {', '.join(left_out)}", "dim"))


def fitting(rows: Sequence[Row], columns: Sequence[Column[Row]], width: int) -> list[Column[Row]]:
    """The columns that fit in ``width``; those that may not be left out stay even if they do not."""
    shown = list(columns)
    while _natural_width(shown, _cells(rows, shown)) > width:
        spare = max(shown, key=lambda column: column.spare)
        if not spare.spare:
            break
        shown.remove(spare)
    return shown


def _natural_width(columns: Sequence[Column[Row]], cells: Sequence[Sequence[str]]) -> int:
    return sum(_widths(columns, cells)) + 2 * (len(columns) - 1)


def _print_folded(columns: Sequence[Column[Row]], cells: Sequence[Sequence[str]]) -> None:
    """Cells fold where a row is wider than the terminal; a blank line keeps the rows apart."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(Text(column.heading, style="bold"), justify=justify, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)


def print_wrapped(text: str, *, first: str = "", indent: int = 0) -> None:
    """Print ``first`` and ``text``; on a terminal the lines after the first are indented to where the text began."""
    if not sys.stdout.isatty():
        print(first + text)
        return
    room = max(terminal_width() - indent, 30)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    print(first + ("\n" + " " * indent).join(lines))


def terminal_width() -> int:
    """Columns of the terminal, or of COLUMNS."""
    return shutil.get_terminal_size().columns


def print_value(value: Any, output: TextFormat) -> None:
    """Print a value as JSON (two blanks of indent, fields in the order of docs/api.md) or as YAML."""
    if output is TextFormat.JSON:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
    else:
        import yaml  # a tenth of the time that `isthmus status` takes

        yaml.dump(
            msgspec.to_builtins(value),
            sys.stdout,
            Dumper=yaml.CSafeDumper,
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=False,
        )


def styled(text: str, style: str) -> str:
    """``text`` in a colour where standard output is a terminal that wants one (NO_COLOR is honoured)."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colours_wanted() else text


def colours_wanted() -> bool:
    """Whether standard output is a terminal on which colours are welcome."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


_STYLES = {"good": "32", "bad": "1;31", "warning": "33", "title": "1", "dim": "2"}

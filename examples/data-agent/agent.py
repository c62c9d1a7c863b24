"""Answers plain questions about a CSV file in its workspace: no model, the standard library only.

A question is matched against a short list of forms (QUESTIONS); each has a function that answers it line by line. A
filter holds for the questions after it, until it is cleared.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MOST_ROWS = 50
HELP = """I can answer:
  columns                          which columns there are
  rows                             how many rows there are
  show [N]                         the first rows
  average|sum|min|max|count of COLUMN [by COLUMN]
  top N by COLUMN                  the rows with the largest values
  where COLUMN is|>|< VALUE        look only at these rows from now on
  all                              look at all rows again
  use FILE.csv                     read another file of the workspace
"""


class Unclear(Exception):
    """A question that can't be answered; the message says why."""


class Table:
    """A CSV file with a header line, and the filters that hold now."""

    def __init__(self, path: Path) -> None:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            self.rows = list(reader)
            self.columns = list(reader.fieldnames or [])
        self.name = path.name
        self.filters: list[tuple[str, Callable[[dict[str, str]], bool]]] = []

    def visible(self) -> list[dict[str, str]]:
        return [row for row in self.rows if all(passes(row) for _, passes in self.filters)]

    def column(self, name: str) -> str:
        """The column meant, whatever its case. Raises Unclear."""
        for column in self.columns:
            if column.lower() == name.lower():
                return column
        raise Unclear(f"There is no column {name}. There are: {', '.join(self.columns)}.")

    def numbers(self, column: str, rows: Iterable[dict[str, str]]) -> list[float]:
        """The column's values as numbers; empty cells don't count. Raises Unclear."""
        try:
            return [float(row[column]) for row in rows if row[column].strip()]
        except ValueError:
            raise Unclear(f"{column} does not hold numbers only; try: count of {column} by {column}") from None


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


SUMMARIES: dict[str, Callable[[list[float]], float]] = {
    "average": _average,
    "mean": _average,
    "sum": sum,
    "total": sum,
    "min": min,
    "max": max,
}


def number(value: float) -> str:
    """A number as people write it."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def columns(table: Table) -> Iterator[str]:
    yield f"{table.name} has {len(table.columns)} columns:\n"
    for column in table.columns:
        example = next((row[column] for row in table.rows if row[column]), "empty")
        yield f"  {column} (e.g. {example})\n"


def rows(table: Table) -> Iterator[str]:
    yield f"{len(table.visible())} of {len(table.rows)} rows" if table.filters else f"{len(table.rows)} rows"
    yield f" where {' and '.join(text for text, _ in table.filters)}\n" if table.filters else "\n"


def show(table: Table, count: str = "") -> Iterator[str]:
    yield from _print(table, table.visible()[: min(int(count or 10), MOST_ROWS)])


def summarize(table: Table, what: str, name: str, by: str = "") -> Iterator[str]:
    what, column = what.lower(), table.column(name)
    visible = table.visible()
    if not by:
        yield f"{what} of {column}: {_summary(table, what, column, visible)}\n"
        return
    key = table.column(by)
    groups: dict[str, list[dict[str, str]]] = {}
    for row in visible:
        groups.setdefault(row[key], []).append(row)
    yield f"{what} of {column} by {key}:\n"
    for group, members in sorted(groups.items()):
        yield f"  {group}: {_summary(table, what, column, members)}\n"


def _summary(table: Table, what: str, column: str, members: list[dict[str, str]]) -> str:
    if what == "count":
        return str(sum(bool(row[column]) for row in members))
    values = table.numbers(column, members)
    return number(SUMMARIES[what](values)) if values else "no values"


def top(table: Table, count: str, name: str) -> Iterator[str]:
    column = table.column(name)
    filled = [row for row in table.visible() if row[column].strip()]
    table.numbers(column, filled)  # says so if these aren't numbers
    best = sorted(filled, key=lambda row: float(row[column]), reverse=True)
    yield from _print(table, best[: min(int(count or 5), MOST_ROWS)])


def _print(table: Table, chosen: list[dict[str, str]]) -> Iterator[str]:
    widths = [max(len(name), *(len(row[name]) for row in chosen)) if chosen else len(name) for name in table.columns]
    yield "  ".join(name.ljust(width) for name, width in zip(table.columns, widths, strict=True)).rstrip() + "\n"
    for row in chosen:
        cells = (row[name].ljust(width) for name, width in zip(table.columns, widths, strict=True))
        yield "  ".join(cells).rstrip() + "\n"


def where(table: Table, name: str, relation: str, value: str) -> Iterator[str]:
    column, value = table.column(name), value.strip("'\"")
    if relation in ("<", ">"):
        try:
            bound = float(value)
        except ValueError:
            raise Unclear(f"{value} is not a number") from None
        table.numbers(column, table.rows)
        sign = 1 if relation == ">" else -1
        passes = lambda row: bool(row[column].strip()) and sign * float(row[column]) > sign * bound  # noqa: E731
    else:
        relation = "is"
        passes = lambda row: row[column].strip().lower() == value.lower()  # noqa: E731
    table.filters.append((f"{column} {relation} {value}", passes))
    yield from rows(table)


def everything(table: Table) -> Iterator[str]:
    table.filters.clear()
    yield from rows(table)


QUESTIONS: list[tuple[str, Callable[..., Iterator[str]]]] = [
    (r"(?:what |which )?columns.*", columns),
    (r"(?:how many )?rows.*", rows),
    (r"(?:show|list|head)(?: (\d{1,6}))?(?: rows)?", show),
    (r"(?:what is the )?(average|mean|sum|total|min|max|count) (?:of )?(\w+)(?: (?:by|per) (\w+))?", summarize),
    (r"top(?: (\d{1,6}))? by (\w+)", top),
    (r"(?:where|filter|only) (\w+) ?(is|=|<|>) ?(.+)", where),
    (r"(?:all|reset|clear)(?: rows)?", everything),
]

_table: Table | None = None


def _open(workspace: Path, name: str = "") -> Table:
    """The file of this name, or the first there is. Raises Unclear."""
    files = sorted(workspace.glob("*.csv"))
    chosen = [file for file in files if file.name == name] if name else files[:1]
    if not chosen:
        known = ", ".join(file.name for file in files) or "none; put one into the workspace"
        raise Unclear(f"There is no CSV file {name}. CSV files here: {known}.".replace("  ", " "))
    try:
        return Table(chosen[0])
    except (csv.Error, UnicodeDecodeError) as error:
        raise Unclear(f"{chosen[0].name} can't be read: {error}") from None


def answer(question: str, workspace: Path) -> Iterator[str]:
    """The answer to a question, line by line. Raises Unclear."""
    global _table
    if match := re.fullmatch(r"use (\S+\.csv)", question):
        _table = _open(workspace, match[1])
        yield f"Reading {_table.name}: "
        yield from rows(_table)
        return
    if _table is None:
        _table = _open(workspace)
    for form, function in QUESTIONS:
        if match := re.fullmatch(form, question, re.IGNORECASE):
            yield from function(_table, *(text or "" for text in match.groups()))
            return
    raise Unclear(f"I don't understand that. {HELP}")


async def turn(message: Any, session: Any) -> Any:
    """One question, one answer."""
    question = " ".join(message.text.split()).rstrip("?.! ")
    try:
        for line in answer(question, session.workspace):
            yield line
    except Unclear as unclear:
        yield str(unclear)

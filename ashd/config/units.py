"""Sizes and lengths of time as people write them: "256MiB", "10s", "250ms".

Covers: reading and writing them, exactly: what is written reads back as the same value.
"""

from __future__ import annotations

import re
from decimal import Decimal

_SIZES = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_DECIMAL_SIZES = {"kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_TIMES_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
_NUMBER_AND_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """Bytes in "256MiB", "1.5GiB", "10MB" or a plain number of bytes. Raises ValueError that says what is allowed."""
    number, unit = _split(text, hint='a size, e.g. 65536, "64KiB" or "256MiB"')
    factor = {**_SIZES, **_DECIMAL_SIZES}.get(unit or "B")
    if factor is None:
        raise ValueError(f'is not a size: the unit "{unit}" is none of {", ".join([*_SIZES, *_DECIMAL_SIZES])}')
    return int(number * factor)


def parse_seconds(text: str, *, default_unit: str = "s") -> float:
    """Seconds in "10s", "250ms", "5m", "1h" or a plain number of `default_unit`. Raises ValueError as above."""
    number, unit = _split(text, hint='a length of time, e.g. 10, "10s", "250ms", "5m" or "1h"')
    milliseconds = _TIMES_MS.get(unit or default_unit)
    if milliseconds is None:
        raise ValueError(f'is not a length of time: the unit "{unit}" is none of {", ".join(_TIMES_MS)}')
    return number * milliseconds / 1000


def format_bytes(value: int) -> str:
    """The largest unit that says it exactly: 268435456 -> "256MiB"."""
    for unit, factor in reversed(_SIZES.items()):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{unit}"
    return f"{value}B"


def format_seconds(value: float) -> str:
    """Whole minutes or hours in seconds too ("3600s"): a file full of them compares at a glance. 0.25 -> "250ms"."""
    if value == int(value):
        return f"{int(value)}s"
    milliseconds = round(value * 1000)
    return f"{milliseconds}ms" if milliseconds / 1000 == value else f"{Decimal(str(value)):f}s"


def _split(text: str, *, hint: str) -> tuple[float, str]:
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"is not {hint}")
    number = float(match[1])
    if number > 2**53:  # from here on floats leave whole numbers out
        raise ValueError("is too large")
    return number, match[2]

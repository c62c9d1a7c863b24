"""Sizes and lengths of time read as people write them, and write back as the same value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ashd.config.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64KiB", 65536),
        ("256MiB", 256 * 1024**2),
        ("1.5 GiB", 3 * 512 * 1024**2),
        ("10MB", 10**7),
    ],
)
def test_a_size_may_have_any_unit_or_none(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10.0), ("10s", 10.0), ("250ms", 0.25), ("0.5s", 0.5), ("5m", 300.0), ("1h", 3600.0)]
)
def test_a_length_of_time_may_have_any_unit_or_none(text: str, value: float) -> None:
    assert parse_seconds(text) == value


def test_a_bare_number_takes_the_unit_its_variable_promises() -> None:
    assert parse_seconds("1500", default_unit="ms") == 1.5


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1 2", "256mib", "1e3", "∞"])
def test_what_is_not_a_size_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "10 parsecs", "nan"])
def test_what_is_not_a_length_of_time_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="is not a length of time"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["9" * 17, "9" * 400, "9" * 400 + "h"])
def test_a_number_too_large_to_be_exact_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="too large"):
        parse_seconds(text)


@given(st.integers(min_value=0, max_value=2**53))
def test_every_size_reads_back_as_it_was_written(value: int) -> None:
    assert parse_bytes(format_bytes(value)) == value


@given(st.integers(min_value=0, max_value=10**9))
def test_every_length_of_time_reads_back_as_it_was_written(milliseconds: int) -> None:
    assert parse_seconds(format_seconds(milliseconds / 1000)) == milliseconds / 1000

"""What keepers believe of what they are sent: lines however they are cut, JSON objects and nothing else."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.protocol import (
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    LineReader,
    Malformed,
    check_shape,
    content_blocks,
    parse_object,
    timeline_of,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=5)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, cut at these places."""
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(at)]


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(min_value=0)))
def test_any_cut_of_the_bytes_gives_the_same_lines(chunks: list[bytes], places: list[int]) -> None:
    data = b"\n".join(chunks)
    whole, pieces = LineReader(20), LineReader(20)
    expected = list(whole.feed(data))
    assert [line for piece in cut(data, places) for line in pieces.feed(piece)] == expected
    assert pieces.oversized == whole.oversized
    assert expected == [line for line in data.split(b"\n")[:-1] if len(line) <= 20]


@given(st.lists(st.binary(max_size=200)))
def test_a_line_reader_never_holds_more_than_one_line_may_have(pieces: list[bytes]) -> None:
    reader = LineReader(16)
    for piece in pieces:
        assert all(len(line) <= 16 for line in reader.feed(piece))
        assert len(reader._held) <= 16


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_an_object_or_malformed(raw: bytes) -> None:
    try:
        value, line = parse_object(raw)
    except Malformed:
        return
    assert isinstance(value, dict)
    assert line.isascii()
    assert b"\n" not in line.strip()
    assert json.loads(line) == value


@given(json_objects, st.booleans())
def test_every_json_object_is_believed_whole(value: dict[str, Any], ascii_only: bool) -> None:
    try:
        raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8")
    except UnicodeEncodeError:
        return  # a lone surrogate has no UTF-8
    assert parse_object(raw)[0] == value


@given(json_objects)
def test_every_object_has_a_timeline_and_blocks(value: dict[str, Any]) -> None:
    for kind in ("assistant", "user", "result", None):
        message = {**value, "type": kind, "message": {"content": [value, *value.values()]}}
        assert all(json.dumps(data) for _, data in timeline_of(message))
        assert all(isinstance(block, dict) for block in content_blocks(message))


@pytest.mark.parametrize("depth", [MAX_JSON_DEPTH - 1, MAX_JSON_DEPTH, 100_000])
def test_nesting_is_limited(depth: int) -> None:
    raw = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    if depth < MAX_JSON_DEPTH:
        assert parse_object(raw)[1] == raw
    else:
        with pytest.raises(Malformed):
            parse_object(raw)


def test_values_are_counted_outside_of_strings_only() -> None:
    text = json.dumps({"text": '[{,:"\\' * MAX_JSON_VALUES}).encode()
    assert parse_object(text)[1] == text
    crowd = {"list": [0] * (MAX_JSON_VALUES + 1)}
    with pytest.raises(Malformed, match="more than"):
        parse_object(json.dumps(crowd).encode())
    with pytest.raises(Malformed, match="more than"):
        check_shape(crowd, json.dumps(crowd).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000])
def test_numbers_that_could_not_be_written_again_are_malformed(number: str) -> None:
    with pytest.raises(Malformed):
        parse_object(b'{"a": ' + number.encode() + b"}")

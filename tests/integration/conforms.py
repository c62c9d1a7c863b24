"""Whether an answer is what the API's document says: its status is listed, its JSON has the schema and nothing more."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ashd.coordinator.openapi import document

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": int,
}


def complaints(method: str, path: str, status: int, body: Any) -> list[str]:
    """What is not as documented, of an answer in JSON to a request that has a route."""
    templates = {template: re.sub(r"{\w+}", "[^/]+", template) for template in document()["paths"]}
    (found,) = [one for one, pattern in templates.items() if re.fullmatch(pattern, path.partition("?")[0])]
    answers = document()["paths"][found][method.lower()]["responses"]
    if str(status) not in answers:
        return [f"{method} {found} may not answer {status}"]
    answer = _resolved(answers[str(status)])
    return list(_wrong(answer["content"]["application/json"]["schema"], body, "body"))


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        target: Any = document()
        for name in node["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        node = target
    return node


def _wrong(schema: dict[str, Any], value: Any, where: str) -> Iterator[str]:
    schema = _resolved(schema)
    if "const" in schema and value != schema["const"]:
        yield f"{where} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where} is {value!r}, none of {schema['enum']}"
    if "oneOf" in schema and sum(not list(_wrong(one, value, where)) for one in schema["oneOf"]) != 1:
        yield f"{where} is {value!r}, not one of the alternatives"
    kind = schema.get("type")
    if kind is not None and (
        not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        yield f"{where} is {value!r}, no {kind}"
        return
    if kind == "object":
        yield from _wrong_object(schema, value, where)
    elif kind == "array":
        for index, item in enumerate(value):
            yield from _wrong(schema["items"], item, f"{where}[{index}]")
    elif kind == "string":
        yield from _wrong_string(schema, value, where)
    elif kind in ("integer", "number") and value < schema.get("minimum", value):
        yield f"{where} is {value}, below {schema['minimum']}"


def _wrong_object(schema: dict[str, Any], value: dict[str, Any], where: str) -> Iterator[str]:
    properties = schema.get("properties", {})
    yield from (f"{where}.{name} is missing" for name in schema.get("required", []) if name not in value)
    for name, item in value.items():
        if name in properties:
            yield from _wrong(properties[name], item, f"{where}.{name}")
        elif "additionalProperties" in schema:
            yield from _wrong(schema["additionalProperties"], item, f"{where}.{name}")
        elif properties:
            yield f"{where}.{name} is not documented"


def _wrong_string(schema: dict[str, Any], value: str, where: str) -> Iterator[str]:
    if not re.search(schema.get("pattern", ""), value):
        yield f"{where} is {value!r}, not like {schema['pattern']}"
    if schema.get("format") == "uuid" and str(uuid.UUID(value)) != value:
        yield f"{where} is {value!r}, no uuid in canonical form"
    if schema.get("format") == "date-time" and datetime.fromisoformat(value).tzinfo is None:
        yield f"{where} is {value!r}, a time without a zone"

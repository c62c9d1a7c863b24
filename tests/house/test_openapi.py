"""The API's document says what the application answers, and holds together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import falcon.inspect
import falcon.testing
import pytest

from ashd.config.schema import CoordinatorConfig
from ashd.coordinator.app import build_app
from ashd.coordinator.openapi import document
from ashd.coordinator.services import Services

DOCUMENT = document()
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}  # OpenAPI 3.1, Path Item Object
SCHEMA_KEYS = {
    *("type", "properties", "required", "items", "enum", "const", "oneOf", "not", "$ref", "description", "examples"),
    *("format", "pattern", "minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "default"),
    *("additionalProperties", "propertyNames", "maxProperties", "contentEncoding", "contentMediaType"),
}


@dataclass
class Operation:
    path: str
    method: str
    data: dict[str, Any]
    parameters: list[dict[str, Any]]


def operations() -> Iterator[Operation]:
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS & set(item):
            yield Operation(path, method, item[method], item.get("parameters", []) + item[method].get("parameters", []))


def schemas(node: Any = DOCUMENT) -> Iterator[dict[str, Any]]:
    """Every schema, wherever it stands."""
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if name == "schema":
            yield from parts(child)
        elif name == "schemas":
            for schema in child.values():
                yield from parts(schema)
        else:
            yield from schemas(child)


def parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and those inside it."""
    yield schema
    for key in ("items", "not", "additionalProperties", "propertyNames"):
        if key in schema:
            yield from parts(schema[key])
    for inner in (*schema.get("properties", {}).values(), *schema.get("oneOf", [])):
        yield from parts(inner)


def app() -> Any:
    """The application; nothing behind it is asked here."""
    nothing: Any = SimpleNamespace()
    return build_app(
        Services(
            config=CoordinatorConfig(),
            db=nothing,
            coordinator_id="host-1",
            started_at=0.0,
            dispatch=nothing,
            streams=nothing,
        )
    )


def test_paths_and_methods_are_the_applications() -> None:
    routes = {
        (route.path, method.method.lower())
        for route in falcon.inspect.inspect_routes(app())
        for method in route.methods
        if not method.internal
    }
    assert {(operation.path, operation.method) for operation in operations()} == routes


def test_a_document_and_its_page_are_served_without_a_key() -> None:
    client = falcon.testing.TestClient(app())
    served = client.simulate_get("/openapi.json")
    assert served.headers["content-type"] == "application/json" and served.json == json.loads(json.dumps(DOCUMENT))
    page = client.simulate_get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(?:src|href|url|@import)\s*[=(:]?\s*[\"']?(?:https?:)?//", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.simulate_head("/docs").headers["content-length"] == str(len(page.content))


@pytest.mark.parametrize("operation", list(operations()), ids=lambda one: f"{one.method} {one.path}")
def test_an_operation_is_complete(operation: Operation) -> None:
    data = operation.data
    assert data["summary"] and not data["summary"].endswith(".")
    assert set(data) <= {"tags", "summary", "description", "parameters", "requestBody", "responses", "security"}
    assert data["tags"][0] in {tag["name"] for tag in DOCUMENT["tags"]}
    assert "default" in data["responses"] and any(status.startswith("2") for status in data["responses"])
    (security,) = data["security"] or [{}]
    assert set(security) <= set(DOCUMENT["components"]["securitySchemes"])
    expected = {"internalSecret"} if operation.path.startswith("/api/internal/") else {"apiKey"}
    assert set(security) == (expected if operation.path.startswith("/api/") else set())
    assert ("401" in data["responses"]) == bool(security)
    in_path = {one["name"] for one in operation.parameters if one["in"] == "path" and one["required"]}
    assert in_path == set(re.findall(r"{(\w+)}", operation.path))
    assert len({(one["name"], one["in"]) for one in operation.parameters}) == len(operation.parameters)
    assert all(one["in"] in ("path", "query", "header") and one["schema"] for one in operation.parameters)
    assert ("requestBody" in data) == (operation.method in ("post", "put"))


def test_references_lead_somewhere_and_nothing_is_left_over() -> None:
    text = json.dumps(DOCUMENT)
    used = set(re.findall(r'"\$ref": "#/components/(\w+/\w+)"', text))
    assert used == {
        f"{kind}/{name}" for kind in ("schemas", "responses") for name in DOCUMENT["components"][kind]
    } and text.count("$ref") == text.count('"$ref": "#/components/')


def test_schemas_are_well_formed() -> None:
    for schema in schemas():
        assert set(schema) <= SCHEMA_KEYS, schema
        assert schema.get("type") in (None, "string", "integer", "number", "boolean", "array", "object", "null")
        if "properties" in schema:  # those under oneOf say only what is particular
            assert set(schema.get("required", [])) <= set(schema["properties"])
        assert ("items" in schema) == (schema.get("type") == "array")
        re.compile(schema.get("pattern", ""))


def test_the_document_has_the_shape_of_openapi_31() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert set(DOCUMENT) == {"openapi", "info", "tags", "paths", "components"}
    assert {"title", "version"} <= set(DOCUMENT["info"])
    for item in DOCUMENT["paths"].values():
        assert set(item) <= METHODS | {"parameters"}
    for operation in operations():
        for status, answer in operation.data["responses"].items():
            assert status == "default" or re.fullmatch("[1-5][0-9]{2}", status)
            assert "$ref" in answer or answer["description"]

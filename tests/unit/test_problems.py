"""Every failure leaves as the one envelope, and nothing of the inside leaves with it."""

from __future__ import annotations

from typing import Any

import falcon
import falcon.testing
import pytest
from falcon.asgi import App, Request, Response

from ashd.coordinator import problems
from ashd.coordinator.request import Fields, json_object
from ashd.errors import AshdError, Conflict, Fault, NotFound, Rejected, Unavailable


class Failing:
    """Raises what it is given; POST takes a small JSON body, PUT starts work first."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def on_get(self, req: Request, resp: Response) -> None:
        resp.text = "half an answer"
        raise self._error

    async def on_post(self, req: Request, resp: Response) -> None:
        resp.media = (await json_object(req, 100)).values

    async def on_put(self, req: Request, resp: Response) -> None:
        problems.starts_work(req)
        if req.get_param("admitted"):
            problems.admitted(req)
        raise self._error


def client(error: Exception | None = None) -> falcon.testing.TestClient:
    app: App[Any, Any] = App()
    problems.install(app)
    app.add_route("/x", Failing(error or Fault("boom")))
    return falcon.testing.TestClient(app)


@pytest.mark.parametrize(
    ("error", "status", "code", "retryable"),
    [
        (Rejected("no", code="a.b"), 400, "a.b", False),
        (Rejected("no", status=401), 401, "request.invalid", False),
        (NotFound("gone"), 404, "not_found", False),
        (Conflict("open", code="turn.open", retryable=True), 409, "turn.open", True),
        (Unavailable("later"), 503, "unavailable", True),
        (Fault("secret detail"), 500, "fault", False),
        (AshdError("secret detail"), 500, "fault", False),
        (ValueError("secret detail"), 500, "fault", False),
        (falcon.HTTPForbidden(), 403, "request.invalid", False),
    ],
)
def test_every_family_has_its_status_and_code(error: Exception, status: int, code: str, retryable: bool) -> None:
    answer = client(error).simulate_get("/x")
    assert answer.status_code == status
    assert answer.json["statusCode"] == status
    assert (answer.json["code"], answer.json["retryable"]) == (code, retryable)
    assert set(answer.json) == {"error", "statusCode", "code", "retryable"}
    assert "secret" not in answer.text
    assert answer.headers["content-type"] == "application/json"


def test_unavailable_says_when_to_come_back() -> None:
    assert client(Unavailable("later", retry_after_s=2.5)).simulate_get("/x").headers["retry-after"] == "3"


def test_errors_of_what_starts_work_say_whether_it_started() -> None:
    assert client(Rejected("no")).simulate_put("/x").json["admitted"] == "no"
    assert client(Unavailable("later")).simulate_put("/x").json["admitted"] == "no"
    assert client(Unavailable("later")).simulate_put("/x?admitted=1").json["admitted"] == "unknown"
    unknown = Unavailable("later", code="database.outcome_unknown")
    assert client(unknown).simulate_put("/x").json["admitted"] == "unknown"
    assert client(ValueError("bug")).simulate_put("/x").json["admitted"] == "unknown"


def test_unknown_routes_and_methods_have_the_envelope() -> None:
    missing = client().simulate_get("/nowhere")
    assert (missing.status_code, missing.json["code"]) == (404, "route.not_found")
    refused = client().simulate_delete("/x")
    assert (refused.status_code, refused.json["code"]) == (405, "method.not_allowed")
    assert "GET" in refused.headers["allow"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", {}, 400, "body.invalid_json"),
        (b"\xff", {}, 400, "body.invalid_json"),
        (b"[]", {}, 400, "body.invalid_json"),
        (b'{"a":NaN}', {}, 400, "body.invalid_json"),
        (b"[" * 99, {}, 400, "body.invalid_json"),
        (b"", {}, 400, "body.missing"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "body.media_type"),
        (b'"' + b"x" * 100 + b'"', {}, 413, "body.too_large"),
    ],
)
def test_a_bad_body_is_named(body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    answer = client().simulate_post("/x", body=body, headers=headers)
    assert (answer.status_code, answer.json["code"]) == (status, code)


def test_a_charset_beside_the_media_type_is_fine() -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert client().simulate_post("/x", body=b'{"a":1}', headers=headers).json == {"a": 1}


@pytest.mark.parametrize(
    ("values", "read", "complaint"),
    [
        ({"a": 1}, lambda f: f.text("a", most=5), "a must be a string"),
        ({"a": "123456"}, lambda f: f.text("a", most=5), "a must have at most 5 characters"),
        ({"a": "x\0"}, lambda f: f.text("a", most=5), "NUL"),
        ({"a": "\ud800"}, lambda f: f.text("a", most=5), "surrogates"),
        ({"a": ""}, lambda f: f.required_text("a", most=5), "a is required"),
        ({}, lambda f: f.required_text("a", most=5), "a is required"),
        ({"a": "z"}, lambda f: f.choice("a", ("x", "y")), "a must be one of x, y"),
        ({"a": []}, lambda f: f.choice("a", ("x", "y")), "a must be one of x, y"),
        ({"a": "true"}, lambda f: f.flag("a"), "a must be true or false"),
        ({"a": True}, lambda f: f.integer("a", 0, 9), "a must be a whole number from 0 to 9"),
        ({"a": 10}, lambda f: f.integer("a", 0, 9), "a must be a whole number from 0 to 9"),
        ({"a": "1"}, lambda f: f.number("a", 0, 9), "a must be a number from 0 to 9"),
        ({"a": ["x", 1]}, lambda f: f.texts("a"), "a must be an array"),
        ({"a": []}, lambda f: f.mapping("a"), "a must be an object"),
        ({"a": {"1X": "y"}}, lambda f: f.env("a"), 'a has the name "1X"'),
        ({"a": {"X": 1}}, lambda f: f.env("a"), "a.X must be a string"),
        ({"a": [{}, 1]}, lambda f: f.objects("a", most=5), "a[1] must be an object"),
        ({"a": []}, lambda f: f.objects("a", most=5), "a must be an array of 1 to 5 objects"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(values: dict[str, Any], read: Any, complaint: str) -> None:
    with pytest.raises(Rejected) as caught:
        read(Fields(values))
    assert complaint in caught.value.message


def test_absent_and_null_fields_are_the_same() -> None:
    for fields in (Fields({}), Fields({"a": None})):
        assert fields.text("a", most=1) is None
        assert fields.integer("a", 0, 1) is None
        assert fields.env("a") is None
        assert fields.objects("a", most=1) is None
        assert fields.flag("a") is False

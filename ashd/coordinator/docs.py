"""/openapi.json and /docs: the API's document, and a page that shows it. The page loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files

import falcon
from falcon.asgi import Request, Response

from ashd.coordinator.openapi import document


class Document:
    """/openapi.json"""

    open_without_key = True

    def __init__(self) -> None:
        self._text = json.dumps(document())

    async def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = falcon.MEDIA_JSON
        resp.text = self._text

    on_head = on_get


class Page:
    """/docs"""

    open_without_key = True

    def __init__(self) -> None:
        self._text = (files("ashd.coordinator") / "docs.html").read_text("utf-8")
        self._policy = _policy(self._text)

    async def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.set_header("Content-Security-Policy", self._policy)
        resp.text = self._text

    on_head = on_get


def _policy(page: str) -> str:
    """SECURITY: the browser runs the page's own script and style and nothing else (CSP level 3, hash sources)."""
    script, style = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[0] for tag in ("script", "style"))
    return (
        f"default-src 'none'; connect-src 'self'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

"""Every stable code stands in docs/errors.md, and nothing else does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"

_FAMILIES = (
    r"agent|auth|body|bundle|claude|command|credential|cursor|database|disk|fleet|idempotency|internal|journal|keeper|lease|"
    r"method|peer|request|route|runner|sandbox|secret|server|session|turn|workspace|zygote"
)
_CODE = re.compile(rf"(?:{_FAMILIES})\.[a-z_]+")
# Of the same shape: file names, modules, settings.
_NO_CODES = re.compile(
    r".*\.(?:py|yaml|sh|json|log|sock|new)|sandbox\.(?:turns|zygote|bridge|keeper|runtimes)|journal\.max_frame"
)
# Shown by clients for codes the server may one day send; ashd has no place yet that raises them.
_AWAITED = {"runner.lost"}


def _sources() -> Iterator[Path]:
    for room in ("ashd", "sandbox"):
        yield from (path for path in sorted((ROOT / room).rglob("*.py")) if "wire/v1" not in path.as_posix())


def _named_codes(tree: ast.AST) -> Iterator[str]:
    """Literals in `code="…"`, as keyword, default or attribute, whatever they look like."""
    for node in ast.walk(tree):
        keyword = isinstance(node, ast.keyword) and node.arg == "code"
        assigned = isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "code" for target in node.targets)
        if keyword or assigned:
            value = node.value  # type: ignore[attr-defined]
            branches = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
            yield from (
                part.value
                for part in branches
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value
            )


def _codes_in_source() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        literals = (
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        shaped = (text for text in literals if _CODE.fullmatch(text) and not _NO_CODES.fullmatch(text))
        for code in (*_named_codes(tree), *shaped):
            found.setdefault(code, path.relative_to(ROOT))
    return found


def _codes_on_page() -> set[str]:
    rows = re.findall(r"^\| `([a-z_.]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows)), "a code stands on the page twice"
    return set(rows)


def test_every_code_is_explained() -> None:
    known = _codes_on_page() | _AWAITED
    missing = {code: str(path) for code, path in _codes_in_source().items() if code not in known}
    assert not missing, f"docs/errors.md lacks {missing}"


def test_the_page_explains_no_code_that_is_gone() -> None:
    gone = _codes_on_page() - set(_codes_in_source())
    assert not gone, f"docs/errors.md explains {gone}, which nothing raises"


def test_the_search_finds_codes_in_all_their_shapes() -> None:
    source = 'raise X("t", code="odd_one")\nclass A:\n    code = "other"\ncode = "a.b" if c else "a.c"\n'
    assert set(_named_codes(ast.parse(source))) == {"odd_one", "other", "a.b", "a.c"}

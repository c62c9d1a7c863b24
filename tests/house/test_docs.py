"""The pages: their links lead somewhere, and the commands they name exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ashd import cli

ROOT = Path(__file__).parents[2]

_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
_MAKE = re.compile(r"\bmake ([a-z-]+)\b")
_ASHD = re.compile(r"(?:^|[`$(] ?)ashd ([a-z]+)(?: ([a-z]+))?", re.MULTILINE)


def _pages() -> list[Path]:
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return top + [page for room in ("docs", "loadtest", "examples") for page in sorted((ROOT / room).rglob("*.md"))]


def _named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def _broken(page: Path) -> Iterator[str]:
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in _anchors(target)):
            yield link


@pytest.mark.parametrize("page", _pages(), ids=_named)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    assert not list(_broken(page))


@pytest.mark.parametrize("page", _pages(), ids=_named)
def test_make_targets_named_in_pages_exist(page: Path) -> None:
    targets = set(_TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8")))
    code = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")) + _FENCE.findall(
        page.read_text(encoding="utf-8")
    )
    named = {target for text in code for target in _MAKE.findall(text)}
    assert named <= targets


def test_the_readme_has_the_two_commands_of_the_set_up() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"run", "test"} <= set(_MAKE.findall(text))
    assert "pip install -r requirements/runtime.lock" in text


@pytest.mark.parametrize("page", _pages(), ids=_named)
def test_commands_of_ashd_named_in_code_exist(page: Path) -> None:
    for block in _FENCE.findall(page.read_text(encoding="utf-8")):
        for words in _ASHD.findall(block):
            command = [word for word in words if word]
            assert _is_known(command), f"ashd {' '.join(command)}"


def _is_known(command: list[str]) -> bool:
    """Whether the command line knows these words; the second may be an argument of the first."""
    groups = {
        "agent": {"list", "info", "delete"},
        "session": {"create", "send", "list", "end"},
        "config": {"check", "show"},
    }
    known = {name for action in cli.parser()._actions for name in getattr(action, "choices", None) or ()}
    return command[0] in known and (len(command) == 1 or command[1] in groups.get(command[0], {command[1]}))


def test_pages_name_no_folder_of_a_developers_machine() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.md"], capture_output=True, text=True, check=False)
    pages = {ROOT / name for name in listed.stdout.split()} | set(_pages())
    suspicious = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w+")
    found = {_named(page): match[0] for page in pages if (match := suspicious.search(page.read_text(encoding="utf-8")))}
    assert not found

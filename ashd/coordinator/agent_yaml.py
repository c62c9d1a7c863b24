"""What an agent's folder says about how it runs: agent.yaml, or the file that gives its runtime away.

Covers: api.md §5, every key of agent.yaml with its rule. Leaves out: packing (bundles.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import yaml

from ashd.config.units import parse_seconds
from ashd.coordinator import limits
from ashd.errors import Rejected

FILE = "agent.yaml"
MAX_BYTES = 64 * 1024

RUNTIMES = ("claude", "python", "command", "echo")
NETWORKS = ("none", "host")

_PYTHON_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


@dataclass(frozen=True)
class Spec:
    """How an agent runs; kept as JSON with the agent and each of its sessions."""

    runtime: str
    entry: list[str] = field(default_factory=list)
    """python: one "module:function"; command: argv; else empty."""
    limits: dict[str, int] = field(default_factory=dict)
    network: str | None = None
    preload: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    idleTimeoutMs: int | None = None  # noqa: N815 (the JSON's own spelling)
    turnTimeoutMs: int | None = None  # noqa: N815

    def as_json(self) -> dict[str, Any]:
        """Without what is absent."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {})}


def read(paths: Collection[str], text: bytes | None) -> Spec:
    """The spec of a folder with these `paths`, whose agent.yaml is `text` (None: it has none). Raises Rejected."""
    given = _Reader(text or b"").given()
    runtime = given.get("runtime") or _runtime_of(paths)
    entry = given.get("entry") or (["agent:turn"] if runtime == "python" else [])
    _check_entry(runtime, entry, paths)
    return Spec(
        runtime=runtime,
        entry=entry,
        limits=given.get("limits", {}),
        network=given.get("network"),
        preload=given.get("preload", []),
        env=given.get("env", {}),
        idleTimeoutMs=given.get("idle_timeout"),
        turnTimeoutMs=given.get("turn_timeout"),
    )


def _runtime_of(paths: Collection[str]) -> str:
    if "agent.py" in paths:
        return "python"
    if "CLAUDE.md" in paths:
        return "claude"
    raise Rejected("Agent directory must contain CLAUDE.md", code="agent.no_entry")


def _check_entry(runtime: str, entry: list[str], paths: Collection[str]) -> None:
    if runtime == "claude" and "CLAUDE.md" not in paths:
        raise Rejected("Agent directory must contain CLAUDE.md", code="agent.no_entry")
    if runtime == "command" and not entry:
        raise Rejected('agent.yaml: the runtime command needs entry, e.g. ["./agent"]', code="agent.no_entry")
    if runtime == "python":
        if len(entry) != 1 or not _PYTHON_ENTRY.fullmatch(entry[0]):
            raise Rejected('agent.yaml: entry of a python agent is one "module:function"', code="agent.invalid")
        module = entry[0].partition(":")[0].replace(".", "/")
        if not {f"{module}.py", f"{module}/__init__.py"} & set(paths):
            raise Rejected(f"The agent has no {module}.py, which its entry {entry[0]} names", code="agent.no_entry")


class _Reader:
    """agent.yaml, checked key by key; every complaint names the line."""

    def __init__(self, text: bytes) -> None:
        self._lines: dict[str, int] = {}
        self._values = self._load(text)

    def given(self) -> dict[str, Any]:
        """What is set, as Spec wants it."""
        for name in self._values:
            if name not in _KEYS:
                self._refuse(name, f"is unknown; known are {', '.join(_KEYS)}")
        return {name: self._checked(name, value) for name, value in self._values.items() if value is not None}

    def _checked(self, name: str, value: Any) -> Any:
        try:
            return _KEYS[name](value)
        except ValueError as error:
            self._refuse(name, str(error))

    def _load(self, text: bytes) -> Mapping[str, Any]:
        try:
            root = yaml.compose(text.decode("utf-8"), Loader=yaml.SafeLoader)
            if root is None:
                return {}
            if not isinstance(root, yaml.MappingNode):
                raise Rejected("agent.yaml must be a mapping of keys", code="agent.invalid")
            self._lines = {str(key.value): key.start_mark.line + 1 for key, _ in root.value}
            values = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise Rejected(f"agent.yaml is not valid YAML: {_one_line(error)}", code="agent.invalid") from error
        return {str(name): value for name, value in values.items()}

    def _refuse(self, name: str, rule: str) -> NoReturn:
        line = self._lines.get(name, 1)
        raise Rejected(f"agent.yaml line {line}: {name[:80]} {rule}", code="agent.invalid")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return check


def _texts(value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item and "\0" not in item for item in items):
        raise ValueError("must be a string or a list of strings")
    return items


def _modules(value: Any) -> list[str]:
    names = _texts(value)
    if not all(_MODULE.fullmatch(name) for name in names):
        raise ValueError("must be a list of module names")
    return names


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of names to strings")
    for name, text in value.items():
        if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
            raise ValueError(f"has the name {str(name)[:80]!r}; names match ^{_ENV_NAME.pattern}$")
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"has a value for {name} that is not a string; put it in quotes")
    return value


def _limits(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not set(value) <= set(limits.NAMES):
        raise ValueError(f"must be a mapping of {', '.join(limits.NAMES)}")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= limits.MOST:
            raise ValueError(f"has {name} that is not a whole number from 1 to {limits.MOST}")
    return value


def _milliseconds(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError('must be a length of time, e.g. "10m"')
    milliseconds = round(parse_seconds(str(value)) * 1000)
    if not 1 <= milliseconds <= 30 * 24 * 3600 * 1000:
        raise ValueError("must be longer than nothing and at most 30 days")
    return milliseconds


_KEYS: dict[str, Callable[[Any], Any]] = {
    "runtime": _one_of(RUNTIMES),
    "entry": _texts,
    "limits": _limits,
    "network": _one_of(NETWORKS),
    "preload": _modules,
    "env": _env,
    "idle_timeout": _milliseconds,
    "turn_timeout": _milliseconds,
}

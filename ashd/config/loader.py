"""From a YAML file and ASH_* variables to a checked, frozen configuration that knows where each value came from.

Covers: default < file < variable; unknown and doubled keys; types and bounds; all problems at once, each with its line
or variable. Leaves out: whether the values make sense together (checks.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import yaml

from ashd.config import checks
from ashd.config.schema import Bytes, CoordinatorConfig, RunnerConfig, Seconds, StandaloneConfig
from ashd.config.units import parse_bytes, parse_seconds
from ashd.errors import ConfigError

C = TypeVar("C", CoordinatorConfig, RunnerConfig, StandaloneConfig)
Field = dataclasses.Field[Any]

OPTIONAL_PATH = Path | None
STRINGS = tuple[str, ...]

_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_CLIENT_VARIABLES = {"ASH_API_KEY", "ASH_SERVER_URL", "ASH_INTERNAL_SECRET"}


@dataclass(frozen=True)
class Loaded(Generic[C]):
    """A configuration that passed every check.

    `origins`: dotted key -> "default", "conf/coord.yaml:7" or "ASH_PORT". `notes`: sentences worth a warning.
    """

    config: C
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


def load_coordinator(path: Path | None, environ: Mapping[str, str]) -> Loaded[CoordinatorConfig]:
    """What `ashd coordinator` runs with. Raises ConfigError with all problems."""
    return _load(CoordinatorConfig, path, environ, checks.coordinator)


def load_runner(path: Path | None, environ: Mapping[str, str]) -> Loaded[RunnerConfig]:
    """What `ashd runner` runs with. Raises ConfigError with all problems."""
    return _load(RunnerConfig, path, environ, checks.runner)


def load_standalone(path: Path | None, environ: Mapping[str, str]) -> Loaded[StandaloneConfig]:
    """What `ashd up` runs with. Raises ConfigError with all problems."""
    return _load(StandaloneConfig, path, environ, checks.standalone)


class Setting(NamedTuple):
    """One field of a configuration class with its type as an object (annotations are text)."""

    field: Field
    kind: Any


def settings_of(schema: type) -> list[Setting]:
    """The settings of a configuration class as written; those of a nested class are found through its kind."""
    hints = typing.get_type_hints(schema)
    return [Setting(field, hints[field.name]) for field in dataclasses.fields(schema)]


def top_level_keys(path: Path) -> set[str]:
    """The keys of a file, to tell what kind it is. Raises ConfigError when it can't be read."""
    reader = _Reader(str(path), {})
    keys = set(reader.file_entries(path))
    if reader.problems:
        raise ConfigError(reader.problems)
    return keys


def variables() -> set[str]:
    """Every environment variable that some process of ashd reads."""

    def of(schema: type) -> Iterable[str]:
        for setting in settings_of(schema):
            if dataclasses.is_dataclass(setting.kind):
                yield from of(typing.cast(type, setting.kind))
            elif setting.field.metadata["env"]:
                yield setting.field.metadata["env"]

    return {*of(StandaloneConfig), *_CLIENT_VARIABLES}


def _load(
    schema: type[C], path: Path | None, environ: Mapping[str, str], check: Callable[[C], Iterable[checks.Problem]]
) -> Loaded[C]:
    reader = _Reader(str(path or ""), environ)
    config = reader.section(schema, "", reader.file_entries(path) if path else {})
    for key, text in check(config):
        if key not in reader.faulty:
            reader.complain(reader.origins[key], f"{key} {text}", key)
    if reader.problems:
        raise ConfigError(reader.problems)
    return Loaded(config, reader.origins, tuple(_unknown_variables(environ)))


class _Entry(NamedTuple):
    """One `key: value` of the file."""

    key: yaml.Node
    value: yaml.Node


_Entries = Mapping[str, _Entry]


@dataclass
class _Reader:
    """One reading of a file and the environment, gathering problems and origins on its way."""

    file: str
    environ: Mapping[str, str]
    problems: list[str] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)

    def complain(self, origin: str, text: str, key: str = "") -> None:
        """Note a problem; a `key` already complained about is not judged again by the checks that follow."""
        self.problems.append(text if origin == "default" else f"{origin}: {text}")
        self.faulty.add(key)

    def place(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def file_entries(self, path: Path) -> _Entries:
        """The top level of the file; one that can't be read is a problem and has no entries."""
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError as error:
            self.complain(self.file, f"can't be read: {error.strerror}")
        except UnicodeDecodeError as error:
            self.complain(self.file, f"is not UTF-8 text: {error.reason} at byte {error.start}")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.complain(f"{self.file}:{line}", f"is not YAML: {error.problem}")
        except (yaml.YAMLError, RecursionError) as error:
            self.complain(self.file, f"is not YAML: {error}")
        else:
            return self.entries("the file", root) if root else {}
        return {}

    def entries(self, name: str, node: yaml.Node) -> _Entries:
        if _is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.complain(self.place(node), f"{name} must hold `key: value` lines")
            return {}
        entries: dict[str, _Entry] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.complain(self.place(key), "a key must be a plain word")
            elif key.value in entries:
                self.complain(self.place(key), f"{key.value} is set twice; keep one of the two lines")
            else:
                entries[key.value] = _Entry(key, value)
        return entries

    def section(self, schema: type[Any], prefix: str, entries: _Entries) -> Any:
        """An instance of `schema` from the entries of its level; what is faulty or absent keeps its default."""
        values: dict[str, Any] = {}
        settings = settings_of(schema)
        for setting in settings:
            name, entry = setting.field.name, entries.get(setting.field.name)
            if dataclasses.is_dataclass(setting.kind):
                nested = self.entries(prefix + name, entry.value) if entry else {}
                values[name] = self.section(typing.cast(type, setting.kind), f"{prefix}{name}.", nested)
            else:
                values[name] = self.value(setting, prefix + name, entry)
        names = [setting.field.name for setting in settings]
        for name, entry in entries.items():
            if name not in names:
                self.complain(self.place(entry.key), _unknown(prefix + name, [prefix + known for known in names]))
        return schema(**values)

    def value(self, setting: Setting, key: str, entry: _Entry | None) -> Any:
        """One setting's value from the strongest source that has it. An empty variable counts as not set."""
        rules = setting.field.metadata
        variable = rules["env"] or ""
        raw: str | list[str] | None
        if self.environ.get(variable):
            self.origins[key], raw = variable, self.environ[variable]
        elif entry is not None and not _is_null(entry.value):
            self.origins[key], raw = self.place(entry.value), _raw(entry.value)
        else:
            self.origins[key] = self.place(entry.value) if entry else "default"
            return setting.field.default
        try:
            if raw is None:
                raise ValueError("is a group of values; write a single one")
            unit = "ms" if self.origins[key] == variable and variable.endswith("_MS") else "s"
            return _within(_parse(setting.kind, raw, unit), rules)
        except ValueError as error:
            shown = "***" if rules["secret"] or not isinstance(raw, str) else f'"{raw}"'
            self.complain(self.origins[key], f"{key}: {shown} {error}", key)
            return setting.field.default


def _raw(node: yaml.Node) -> str | list[str] | None:
    """A scalar's text or a list's texts, as written; None for anything deeper."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [str(item.value) for item in node.value]
    return None


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _parse(kind: Any, raw: str | list[str], unit: str) -> Any:
    """A value of type `kind`; ValueError continues the sentence that begins with the text it could not read."""
    if kind == STRINGS:
        return tuple(raw if isinstance(raw, list) else (part.strip() for part in raw.split(",") if part.strip()))
    if isinstance(raw, list):
        raise ValueError("is a list; write a single value")
    if kind is str:
        return raw
    if kind is bool:
        return _parse_bool(raw)
    if kind is int:
        return _parse_int(raw)
    if kind is Bytes:
        return parse_bytes(raw)
    if kind is Seconds:
        return parse_seconds(raw, default_unit=unit)
    assert kind == OPTIONAL_PATH, f"the schema uses {kind}, which the loader does not know"
    return Path(raw).expanduser() if raw else None


def _parse_bool(text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise ValueError("is neither true (1) nor false (0)")
    return _TRUTH[text.lower()]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def _within(value: Any, rules: Mapping[str, Any]) -> Any:
    if rules["choices"] and value not in rules["choices"]:
        raise ValueError(f"is none of: {', '.join(rules['choices'])}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = rules["least"], rules["most"]
        if least is None and value <= 0:
            raise ValueError("must be more than 0")
        if least is not None and value < least:
            raise ValueError(f"must be {least} or more")
        if most is not None and value > most:
            raise ValueError(f"must be {most} or less")
    return value


def _unknown(key: str, known: list[str]) -> str:
    likely = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"{key} is not a setting" + (f"; did you mean {likely[0]}?" if likely else "")


def _unknown_variables(environ: Mapping[str, str]) -> Iterable[str]:
    """Names that look like ours and are not: mentioned, not refused, because the environment belongs to others too."""
    known = variables()
    for name in sorted(environ):
        if name.startswith("ASH_") and name not in known:
            yield _unknown(name, sorted(known)) + " (environment variable, ignored)"

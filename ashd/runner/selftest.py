"""Whether this host's jail denies what it has to: a stand-in until the self-test is here."""

from __future__ import annotations

from dataclasses import dataclass

from ashd.config.schema import RunnerConfig


@dataclass(frozen=True)
class Finding:
    """One thing that was tried in a throw-away jail."""

    name: str
    level: str
    """The lowest level that has to deny it: strict or standard."""
    denied: bool
    detail: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What the jail of this host is worth."""

    level: str
    findings: list[Finding]
    enforced: list[str]
    lacking: list[str]


def examine(config: RunnerConfig) -> Report:
    """Tries it."""
    raise NotImplementedError

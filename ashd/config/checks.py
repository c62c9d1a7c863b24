"""What must hold between settings, beyond the type and bounds of each one.

A check yields a Problem per fault: the key it is about, and a sentence that continues that key and says what to do.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from ashd.config.schema import CoordinatorConfig, RunnerConfig, StandaloneConfig

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_UID_RANGE = re.compile(r"(\d+)-(\d+)")
_SERVER_URL = re.compile(r"https?://[^/\s]+/?|grpc://[^/\s]+")
_LARGEST_UID = 2**32 - 2  # (uid_t)-1 means "unchanged" in setresuid(2)


class Problem(NamedTuple):
    """One fault, e.g. Problem("port", "4100 is also registry_port; …")."""

    key: str
    text: str


def coordinator(config: CoordinatorConfig) -> Iterator[Problem]:
    """Everything `ashd coordinator` demands."""
    yield from _coordinator_alone(config)
    if not config.database_url:
        yield Problem(
            "database_url",
            "is required: set it in the file or as ASH_DATABASE_URL, e.g. postgresql://ashd@db.example/ashd. "
            "For a database of ashd's own, on this machine only, use `ashd up`.",
        )
    yield from _needs_secret("host", config.host, config.internal_secret)
    if config.registry_host and config.registry_socket_dir is None:
        yield from _needs_secret("registry_host", config.registry_host, config.internal_secret)


def runner(config: RunnerConfig) -> Iterator[Problem]:
    """Everything `ashd runner` demands."""
    yield from _runner_alone(config)
    if config.socket is None:
        yield from _needs_secret("host", config.host, config.internal_secret)


def standalone(config: StandaloneConfig) -> Iterator[Problem]:
    """Everything `ashd up` demands. It mints the secret itself, so none is asked for."""
    if config.mode == "coordinator":
        for problem in coordinator(config.coordinator):
            yield Problem(f"coordinator.{problem.key}", problem.text)
        return
    for problem in _coordinator_alone(config.coordinator):
        yield Problem(f"coordinator.{problem.key}", problem.text)
    for problem in _runner_alone(config.runner):
        yield Problem(f"runner.{problem.key}", problem.text)


def _coordinator_alone(config: CoordinatorConfig) -> Iterator[Problem]:
    yield from _host("host", config.host)
    yield from _host("registry_host", config.registry_host or config.host)
    if config.port == config.registry_port and config.registry_socket_dir is None:
        yield Problem("registry_port", f"{config.port} is also the port of the HTTP API; give each its own")
    if config.sweep_interval > config.runner_dead_after:
        yield Problem("sweep_interval", "is longer than runner_dead_after, so dead runners would be noticed late")


def _runner_alone(config: RunnerConfig) -> Iterator[Problem]:
    yield from _host("host", config.host)
    yield from _uid_range(config.uid_range)
    if not _SERVER_URL.fullmatch(config.server_url):
        yield Problem(
            "server_url", f'"{config.server_url}" is neither like http://coordinator:4100 nor like grpc://a:4101,b:4101'
        )
    if config.warm_sandboxes > config.max_sandboxes:
        yield Problem("warm_sandboxes", f"{config.warm_sandboxes} is more than max_sandboxes ({config.max_sandboxes})")
    if config.journal.max_frame > config.journal.max_bytes:
        yield Problem("journal.max_frame", "is larger than journal.max_bytes: such a message could never be written")


def _host(key: str, host: str) -> Iterator[Problem]:
    if not (_is_address(host) or _HOST_NAME.fullmatch(host)):
        yield Problem(key, f'"{host}" is neither an IP address nor a host name (the port has its own setting)')


def _uid_range(text: str) -> Iterator[Problem]:
    match = _UID_RANGE.fullmatch(text)
    if match is None:
        yield Problem("uid_range", f'"{text}" is not like "210000-219999"')
        return
    first, last = int(match[1]), int(match[2])
    if first > last:
        yield Problem("uid_range", f"ends ({last}) before it begins ({first})")
    elif first < 1000:
        # SECURITY: below 1000 are the host's own accounts; a sandbox must never share one.
        yield Problem("uid_range", f"begins at {first}, among the host's own accounts; begin at 1000 or above")
    elif last > _LARGEST_UID:
        yield Problem("uid_range", f"ends at {last}; the largest user id is {_LARGEST_UID}")


def _needs_secret(key: str, host: str, secret: str) -> Iterator[Problem]:
    """SECURITY: who reaches an open registry or runner can take over sessions; loopback is the only exception."""
    if not secret and not is_loopback(host):
        yield Problem(
            key,
            f"{host} can be reached from other machines, but internal_secret is empty, so anyone there could act as a "
            "runner or a coordinator. Set ASH_INTERNAL_SECRET to the same long random text on all of them "
            "(`openssl rand -hex 32` makes one), or listen on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """True when only this machine can connect to `host`; a name other than localhost counts as reachable."""
    if _is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

"""Which server a client command speaks to, and with which key."""

from __future__ import annotations

import argparse
import os
import urllib.parse
from pathlib import Path

from ashd.config.data_dir import API_KEY_FILE, INTERNAL_SECRET_FILE, default_data_dir
from ashd.http_client import DEFAULT_SERVER, Client


def connect(args: argparse.Namespace) -> Client:
    """A client for the options of parsers.add_server_options; opens no connection yet."""
    server = args.server or os.environ.get("ASH_SERVER_URL") or DEFAULT_SERVER
    api_key = args.api_key or os.environ.get("ASH_API_KEY")
    secret = os.environ.get("ASH_INTERNAL_SECRET")
    # SECURITY: what lies in this machine's data_dir is for this machine's server only.
    if _is_local(server):
        data_dir = args.data_dir or default_data_dir(os.environ)
        api_key = api_key or _read(data_dir / API_KEY_FILE)
        secret = secret or _read(data_dir / INTERNAL_SECRET_FILE)
    return Client(server, api_key, internal_secret=secret)


def _is_local(server: str) -> bool:
    try:
        return urllib.parse.urlsplit(server).hostname in ("127.0.0.1", "localhost", "::1")
    except ValueError:
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None

"""Bundles cached by digest, and the workspaces made from them.

Covers: fetching a bundle once, checking it is what its digest says, laying it out as a session's workspace, removing
folders. Leaves out: where bundles come from (uplink.py), what they mean (ashd/coordinator/bundles.py).

A session's workspace begins as a copy of its agent's folder, so a session goes on with the agent it began with.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

from ashd import log
from ashd.errors import Fault, SandboxFailed

_log = log.get(__name__)

Fetch = Callable[[str], AsyncIterator[bytes]]


class BundleCache:
    """Unpacked bundles of this runner, by digest."""

    def __init__(self, folder: Path, fetch: Fetch) -> None:
        self._folder = folder
        self._fetch = fetch
        self._fetching: dict[str, asyncio.Lock] = {}
        self._staging: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def folder_of(self, digest: str) -> Path:
        """The unpacked bundle, fetched first where it isn't here yet. Raises Unavailable, NotFound, Fault (wrong
        content).
        """
        target = self._folder / digest
        if target.is_dir():
            return target
        async with self._fetching.setdefault(digest, asyncio.Lock()):
            if not target.is_dir():
                await self._bring(digest, target)
        self._fetching.pop(digest, None)
        return target

    def abandoned(self) -> list[Path]:
        """Folders of fetches that were cut short, by a supervisor's death for instance."""
        return [folder for folder in self._folder.glob(".new-*") if folder not in self._staging]

    async def _bring(self, digest: str, target: Path) -> None:
        staging = self._folder / f".new-{uuid.uuid4()}"
        self._staging.add(staging)
        try:
            staging.mkdir()
            archive = staging / "bundle.tar.gz"
            with archive.open("wb") as file:
                async for chunk in self._fetch(digest):
                    file.write(chunk)
            await asyncio.to_thread(_unpack, archive, staging / "content", digest)
            (staging / "content").rename(target)
        except OSError as error:
            raise SandboxFailed(f"the agent's files could not be stored: {error}", code="bundle.not_stored") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
            self._staging.discard(staging)
        _log.info("bundle fetched", digest=digest)


class _Hashing:
    """A file object that hashes what is read through it."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def _unpack(archive: Path, target: Path, digest: str) -> None:
    target.mkdir()
    with gzip.open(archive) as plain:
        hashing = _Hashing(plain)
        with tarfile.open(fileobj=hashing, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                _lay_down(tar, member, target)
        while hashing.read(1 << 20):
            pass
    if hashing.sha256.hexdigest() != digest.removeprefix("sha256:"):
        raise Fault(f"bundle {digest} came with other content than its digest says", code="bundle.corrupt")


def _lay_down(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """One member of a canonical archive: folders, files and links inside it, and nothing else.

    SECURITY: the coordinator let in only what stays inside; looked at again, because this runs with our rights.
    (TarFile's own filters came with Python 3.11.4; Debian 12 has 3.11.2.)
    """
    parts = Path(member.name).parts
    if Path(member.name).is_absolute() or ".." in parts:
        raise Fault(f"bundle member {member.name} leaves its folder", code="bundle.corrupt")
    path = target / member.name
    if any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(target)):
        raise Fault(f"bundle member {member.name} goes through a link", code="bundle.corrupt")
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    elif member.issym():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(member.linkname)
    elif member.isfile():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(member)
        assert source is not None
        with path.open("wb") as file:
            shutil.copyfileobj(source, file)
        path.chmod(0o755 if member.mode & 0o100 else 0o644)
    else:
        raise Fault(f"bundle member {member.name} is neither file, folder nor link", code="bundle.corrupt")


def lay_out(bundle: Path, workspace: Path, uid: int | None) -> None:
    """Copies a bundle into an empty workspace and gives it to the sandbox's user.

    SECURITY: nobody else may write here yet, so no path can lead out of it.
    """
    shutil.copytree(bundle, workspace, symlinks=True, dirs_exist_ok=True)
    if uid is None:
        return
    for folder, folders, files in os.walk(workspace):
        for name in [*folders, *files]:
            os.chown(os.path.join(folder, name), uid, uid, follow_symlinks=False)


def remove(folder: Path) -> None:
    """Removes a sandbox's folder, whatever was made in it. Its processes are dead.

    rmtree works by descriptor and never follows a link; where nesting is deeper than its recursion can go, rm(1) can.
    Who is not root has to open first what an agent has closed; chmod(1) follows no link below either.
    """
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except (RecursionError, OSError) as error:
        _log.warning("folder is hard to remove, using rm", folder=str(folder), error=str(error)[:200])
        if os.geteuid() != 0:
            subprocess.run(["chmod", "-R", "u+rwX", "--", str(folder)], check=False, timeout=60)
        subprocess.run(["rm", "-rf", "--one-file-system", "--", str(folder)], check=False, timeout=60)

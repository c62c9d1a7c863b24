"""Packing an agent's folder into a bundle: one canonical tar.gz on disk, whatever it came as.

Canonical: members sorted, mtime 0, owner 0, mode 0644 or 0755, parents explicit. The digest is SHA-256 of that tar
before compression, so the same content has the same digest, however it was sent.

Covers: files of a request, folders of this host, tar.gz uploads, and what is refused in them.
Leaves out: storing (ashd.store.bundles), what agent.yaml means (agent_yaml.py). All of it blocks: call it in a thread.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from ashd.coordinator import agent_yaml
from ashd.errors import Rejected

MAX_MEMBERS = 20_000
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255
MAX_LINK_STEPS = 255
# Long names and other extensions of tar come as members that tarfile reads whole; larger ones are no names.
MAX_EXTENSION_BYTES = 64 * 1024

_COPY_BYTES = 1024 * 1024
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True)
class Bundle:
    """A packed agent, staged on disk."""

    archive: Path
    digest: str
    spec: agent_yaml.Spec


@dataclass(frozen=True)
class _Member:
    """A file (`open` gives its content), a symbolic link (`target`), or a folder (neither)."""

    open: Callable[[], IO[bytes]] | None = None
    size: int = 0
    executable: bool = False
    target: str | None = None


def pack_files(files: Iterable[tuple[str, bytes]], archive: Path, limit_bytes: int) -> Bundle:
    """Pack files given as path and content."""
    tree = _Tree(limit_bytes)
    for path, content in files:
        tree.add(path, _Member(open=lambda data=content: io.BytesIO(data), size=len(content)), twice=False)  # type: ignore[misc]
    return _pack(tree, archive)


def pack_folder(folder: Path, archive: Path, limit_bytes: int) -> Bundle:
    """Pack a folder of this host. SECURITY: links are packed as links, never followed."""
    tree = _Tree(limit_bytes)
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        for name in [*folders, *files]:
            full = Path(parent, name)
            tree.add(full.relative_to(folder).as_posix(), _member_of(full))
    return _pack(tree, archive)


def pack_tar_gz(upload: Path, archive: Path, limit_bytes: int) -> Bundle:
    """Pack a tar.gz that somebody sent.

    SECURITY: nothing is ever extracted under a name of the sender's: the tar is unpacked to one nameless file beside
    `archive`, at most `limit_bytes` of it, and its members are copied from there.
    """
    with ExitStack() as stack:
        plain = stack.enter_context(_decompressed(upload, archive.parent, limit_bytes))
        try:
            source = stack.enter_context(tarfile.open(fileobj=plain, mode="r:", tarinfo=_BoundedTarInfo))
            tree = _tree_of(source, limit_bytes)
            return _pack(tree, archive)
        except (tarfile.TarError, UnicodeError, EOFError, OverflowError) as error:
            raise Rejected(f"The bundle is not a tar archive: {error}", code="bundle.invalid") from error


class _Tree:
    """The members of a bundle by path, each checked as it comes; bounded in number and in size."""

    def __init__(self, limit_bytes: int) -> None:
        self.members: dict[str, _Member] = {}
        self._limit_bytes = limit_bytes
        self._bytes = 0

    def add(self, path: str, member: _Member, *, twice: bool = True) -> None:
        """Add one member; a path given again replaces the first unless `twice` is False."""
        path = _clean(path)
        if not path:  # the folder itself
            return
        if path in self.members and not twice:
            _refuse(path, "is given twice")
        self._bytes += member.size
        if self._bytes > self._limit_bytes:
            raise Rejected(
                f"The agent is larger than {self._limit_bytes} bytes unpacked", code="body.too_large", status=413
            )
        self.members[path] = member
        if len(self.members) > MAX_MEMBERS:
            raise Rejected(f"The agent has more than {MAX_MEMBERS} files", code="bundle.too_many", status=413)

    def finished(self) -> dict[str, _Member]:
        """All members with their parents, sorted; every link checked."""
        for path in list(self.members):
            parts = path.split("/")
            for depth in range(1, len(parts)):
                parent = self.members.setdefault("/".join(parts[:depth]), _Member())
                if parent.open is not None or parent.target is not None:
                    _refuse(path, "lies under something that is not a folder")
        if len(self.members) > MAX_MEMBERS:
            raise Rejected(f"The agent has more than {MAX_MEMBERS} files", code="bundle.too_many", status=413)
        for path, member in self.members.items():
            if member.target is not None:
                self._check_link(path, member.target)
        return dict(sorted(self.members.items()))

    def _check_link(self, path: str, target: str) -> None:
        """SECURITY: follow the link step by step through the bundle's other links, as the kernel will.

        Looking at the text alone isn't enough: `a -> sub/up/..` seems to stay inside, until `sub/up` is a link too.
        """
        if not target or target.startswith("/"):
            _refuse(path, "is a link to an absolute path")
        here = path.split("/")[:-1]
        ahead = target.split("/")
        for _ in range(MAX_LINK_STEPS):
            if not ahead:
                return
            step = ahead.pop(0)
            if step == "..":
                if not here:
                    _refuse(path, "is a link that leaves the folder")
                here.pop()
            elif step not in ("", "."):
                link = self.members.get("/".join([*here, step]), _Member()).target
                if link is None:
                    here.append(step)
                elif link.startswith("/"):
                    _refuse(path, "is a link to an absolute path")
                else:
                    ahead = link.split("/") + ahead
        _refuse(path, "is a link that goes round or too far")


def _clean(path: str) -> str:
    """The path without `.` and doubled slashes. Raises Rejected when it isn't a plain path below the folder."""
    if path.startswith("/"):
        _refuse(path, "is absolute")
    if not path.isprintable() or not _is_utf8(path):
        _refuse(path, "has characters that are not printable UTF-8")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        _refuse(path, "escapes agent directory")
    if len(path.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        _refuse(path[:100] + "…", "is too long")
    return "/".join(parts)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse(path: str, why: str) -> NoReturn:
    shown = path.encode("utf-8", "backslashreplace").decode()
    raise Rejected(f'Path "{shown}" {why}', code="bundle.unsafe")


def _unreadable(error: OSError) -> NoReturn:
    raise Rejected(f"The folder can't be read: {error}", code="bundle.unreadable")


def _member_of(path: Path) -> _Member:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return _Member(target=os.readlink(path))
    if stat.S_ISDIR(info.st_mode):
        return _Member()
    if not stat.S_ISREG(info.st_mode):
        _refuse(path.name, "is neither a file, a folder nor a link")
    return _Member(
        open=lambda: os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb"),
        size=info.st_size,
        executable=bool(info.st_mode & 0o111),
    )


class _BoundedTarInfo(tarfile.TarInfo):
    """A header that may not claim an enormous name; tarfile would read it whole into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENSIONS and header.size > MAX_EXTENSION_BYTES:
            raise Rejected("The bundle has an oversized tar header", code="bundle.invalid")
        return header


def _decompressed(upload: Path, folder: Path, limit_bytes: int) -> IO[bytes]:
    """The tar inside the upload as a file without a name. SECURITY: a zip bomb stops at the limit."""
    # Headers and padding come on top of the content.
    limit_bytes += MAX_MEMBERS * 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
    plain = os.fdopen(os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600), "w+b")
    try:
        with gzip.open(upload, "rb") as source:
            while piece := source.read(_COPY_BYTES):
                if plain.tell() + len(piece) > limit_bytes:
                    raise Rejected(
                        f"The bundle is larger than {limit_bytes} bytes unpacked", code="body.too_large", status=413
                    )
                plain.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        plain.close()
        raise Rejected(f"The bundle is not a tar.gz: {error}", code="bundle.invalid") from error
    except BaseException:
        plain.close()
        raise
    plain.seek(0)
    return plain


def _tree_of(source: tarfile.TarFile, limit_bytes: int) -> _Tree:
    tree = _Tree(limit_bytes)
    for count, info in enumerate(source):
        if count >= 2 * MAX_MEMBERS:
            raise Rejected(f"The agent has more than {MAX_MEMBERS} files", code="bundle.too_many", status=413)
        tree.add(info.name, _member_in(source, info, tree))
    return tree


def _member_in(source: tarfile.TarFile, info: tarfile.TarInfo, tree: _Tree) -> _Member:
    if info.issym():
        return _Member(target=info.linkname)
    if info.isdir():
        return _Member()
    if info.islnk():  # a hard link: the file it names has come before
        original = tree.members.get(_clean(info.linkname))
        if original is None or original.open is None:
            _refuse(info.name, "is a hard link to what is not a file of the bundle")
        return original
    if not info.isreg() or info.issparse():
        _refuse(info.name, "is neither a file, a folder nor a link")
    return _Member(open=lambda: _content(source, info), size=info.size, executable=bool(info.mode & 0o111))


def _content(source: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = source.extractfile(info)
    if content is None:
        _refuse(info.name, "has no content")
    return content


def _pack(tree: _Tree, archive: Path) -> Bundle:
    members = tree.finished()
    spec = agent_yaml.read(members.keys(), _agent_yaml(members))
    digest = hashlib.sha256()
    with (
        archive.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as compressed,
        tarfile.open(fileobj=_Hashing(compressed, digest.update), mode="w|", format=tarfile.PAX_FORMAT) as target,
    ):
        for path, member in members.items():
            _write(target, path, member)
    return Bundle(archive, digest.hexdigest(), spec)


def _agent_yaml(members: dict[str, _Member]) -> bytes | None:
    member = members.get(agent_yaml.FILE)
    if member is None:
        return None
    if member.open is None:
        _refuse(agent_yaml.FILE, "must be a file")
    if member.size > agent_yaml.MAX_BYTES:
        raise Rejected(f"agent.yaml is larger than {agent_yaml.MAX_BYTES} bytes", code="agent.invalid")
    with member.open() as content:
        return content.read(agent_yaml.MAX_BYTES)


def _write(target: tarfile.TarFile, path: str, member: _Member) -> None:
    info = tarfile.TarInfo(path)
    if member.target is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, member.target, 0o777
        target.addfile(info)
    elif member.open is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        target.addfile(info)
    else:
        info.size, info.mode = member.size, 0o755 if member.executable else 0o644
        with member.open() as content:
            try:
                target.addfile(info, content)
            except OSError as error:
                raise Rejected(f'Path "{path}" could not be read whole: {error}', code="bundle.unreadable") from error


class _Hashing(io.RawIOBase):
    """A file that tells a hash what is written through it."""

    def __init__(self, target: gzip.GzipFile, update: Callable[[bytes], None]) -> None:
        self._target = target
        self._update = update

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._update(data)
        return self._target.write(data)

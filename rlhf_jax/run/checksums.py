"""Checksums of a checkpoint's files, to tell a damaged checkpoint from a good one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rlhf_jax.files.atomic import sync_directory, write_atomic
from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.regular_file import MEBIBYTE

NAME = "checksums.json"
_MOST_BYTES = 64 * MEBIBYTE


def write_checksums(directory: Path) -> None:
    """Writes size and SHA-256 of every file in the subdirectories.

    Syncs the files and directories to disk first, so a checkpoint that is renamed to
    its final name afterwards survives a power cut. Files at the top are not included:
    Orbax still changes them, and restoring does not need them.
    """
    digests = {}
    for path in _files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(directory).as_posix()
        digests[name] = {"size": path.stat().st_size, "sha256": digest}
    for folder in directory.rglob("*/"):
        sync_directory(folder)
    write_atomic(directory / NAME, json.dumps(digests, indent=1) + "\n")


def damage(directory: Path) -> str | None:
    """The first difference between the files and their checksums, or None.

    A file that the disk cannot read is damage too, but not one without permission.
    """
    if not os.path.lexists(directory / NAME):
        return f"{NAME} is missing"
    try:
        digests = read_object(directory / NAME, most_bytes=_MOST_BYTES)
        wanted = {name: (row["size"], row["sha256"]) for name, row in digests.items()}
    except (ValueError, TypeError, KeyError):
        return f"{NAME} cannot be read"
    found = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} does not belong to it"
        try:
            difference = _difference(found[name], *wanted[name])
        except PermissionError:
            raise
        except OSError as error:
            difference = f"cannot be read: {error.strerror}"
        if difference is not None:
            return f"{name} {difference}"
    return None


def _difference(path: Path, size: Any, digest: Any) -> str | None:
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            return "does not match its checksum"
    return None


def _files(directory: Path) -> list[Path]:
    """Regular files in subdirectories."""
    return sorted(path for path in directory.glob("*/**/*") if path.is_file())

"""Opens files, and only files, and reads at most so many bytes of them."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rlhf_jax.files.printable import printable

MEBIBYTE = 2**20
CONFIG_BYTES = 4 * MEBIBYTE
"""Largest file of options or fields, such as `config.json`."""
TEMPLATE_BYTES = MEBIBYTE
"""Largest chat template."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# A pipe that takes the place of the file between check and opening cannot block.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file for reading; pipes, devices, sockets and folders are not opened.

    Raises:
        ValueError: if there is no such file, it is none, or it cannot be opened. One
            line that begins with the path.
    """
    name = printable(os.fspath(path))
    try:
        _check_kind(name, os.stat(path).st_mode)
        handle = os.open(path, _FLAGS | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except ValueError as error:
        if "null byte" in str(error):
            raise ValueError(f"{name}: no such file") from None
        raise
    with os.fdopen(handle, "rb") as file:
        _check_kind(name, os.fstat(handle).st_mode)
        yield file


def read_bytes(path: str | os.PathLike[str], *, most_bytes: int) -> bytes:
    """The contents of a file.

    Raises:
        ValueError: as `open_regular`, or if the file is larger than `most_bytes`.
    """
    with open_regular(path) as file:
        try:
            found = file.read(most_bytes + 1)
        except OSError as error:
            raise ValueError(
                f"{printable(os.fspath(path))}: {error.strerror}"
            ) from None
    if len(found) > most_bytes:
        raise ValueError(
            f"{printable(os.fspath(path))}: larger than {most_bytes:,} bytes, the "
            "limit of such files"
        )
    return found


def read_text(path: str | os.PathLike[str], *, most_bytes: int) -> str:
    """The contents of a text file in UTF-8.

    Raises:
        ValueError: as `read_bytes`, or if it is not UTF-8.
    """
    found = read_bytes(path, most_bytes=most_bytes)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        line = found.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{printable(os.fspath(path))}: not UTF-8 text in line {line} "
            f"({error.reason})"
        ) from None


def model_file(directory: Path, name: str) -> Path:
    """The path of a file of a model directory, which cannot lead out of it.

    A link to a file inside the directory is followed, and so is one from a snapshot of
    the Hub's cache to the files of the same repository.

    Raises:
        ValueError: if it is a link to anything else.
    """
    file = directory / name
    if not file.is_symlink():
        return file
    try:
        root, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError):  # RuntimeError before Python 3.13
        raise ValueError(f"{printable(str(file))}: a link in a circle") from None
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in roots):
        raise ValueError(
            f"{printable(str(file))} is a link that leads out of its directory; put a "
            "copy of the file there"
        )
    return file


def _check_kind(name: str, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((kind for is_one, kind in _KINDS if is_one(mode)), "something else")
    raise ValueError(f"{name}: is {kind}, not a file")

"""Files that a crash or a power cut leaves whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.files.printable import printable


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: after a crash it has the old content or the new one.

    Raises:
        ValueError: if the path is a device, a pipe or a folder: renaming would replace
            it, `/dev/null` for root.
        OSError: if it cannot be written; names the path.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{printable(str(path))}: is not a file; give another name")
    if isinstance(content, str):
        content = content.encode("utf-8")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_name(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name empty
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Adds the path to errors without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def remove_temporary(directory: Path) -> None:
    """Removes files that a killed process left half written with `write_atomic`."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Makes new names and renames in a directory survive a power cut.

    No effect where directories cannot be opened, as on Windows.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files that a crash or a power cut leaves whole."""

import os
from pathlib import Path


def write_atomic(path: Path, text: str) -> None:
    """Writes a file atomically: after a crash it has the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name empty
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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

"""One process at a time owns a run directory."""

import contextlib
from collections.abc import Iterator

import jax

from rlhf_jax.run.run_directory import RunDirectory

NAME = ".lock"


@contextlib.contextmanager
def run_lock(run: RunDirectory) -> Iterator[None]:
    """Holds the lock of a run directory, which exists; `kill -9` releases it too.

    Of several JAX processes of one run, process 0 holds it.

    Raises:
        ValueError: if another process holds it, with how to find that process.
    """
    from filelock import FileLock, Timeout

    if jax.process_index() != 0:
        yield
        return
    lock = FileLock(run.path / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--run-dir {run.path} is in use by a running process{_owner(run)}; wait "
            "for it to finish or stop it, or choose another --run-dir"
        ) from None
    except OSError as error:
        raise ValueError(
            f"--run-dir {run.path} cannot be written: {error.strerror}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_free(run: RunDirectory) -> None:
    """Raises ValueError if another process holds the lock; writes nothing."""
    if (run.path / NAME).exists():
        with run_lock(run):
            pass


def _owner(run: RunDirectory) -> str:
    """Process and host of the latest start, for the message."""
    try:
        latest = run.read_launches()[-1]
        return f" ({latest['process']} on {latest['host']})"
    except (OSError, ValueError, LookupError):
        return ""

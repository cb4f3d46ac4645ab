"""Compiled programs that are kept between runs of the tests.

JAX writes its cache in place, so that a worker could read half a file of another, and
the bound it offers makes every write look at every file. Here each process works in a
folder of its own, which begins with links to all that is kept, and hands over what it
has added by renaming, which is safe at any time; the bound is applied then.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import jax

MOST_BYTES = 2**30
NAME = f"tests-{jax.__version__}"
STALE_SECONDS = 24 * 3600
SUFFIX = "-cache"  # of JAX's files


def kept_folder() -> Path:
    """Below the folder that `JAX_COMPILATION_CACHE_DIR` names, or the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    given = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", home / "rlhf_jax"))
    # A worker is told a folder inside, by the process that started it.
    inside = (folder for folder in given.parents if folder.name == NAME)
    return next(inside, given / NAME)


def open_own(kept: Path) -> Path:
    """A new folder inside `kept` with links to all of its programs."""
    kept.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="run-", dir=kept))
    for folder in kept.glob("run-*"):  # left behind by runs that were killed
        if folder.stat().st_mtime < time.time() - STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
    for program in kept.glob(f"*{SUFFIX}"):
        try:
            os.link(program, own / program.name)
        except OSError:  # just removed by another run, or a disk without links
            continue
    return own


def close_own(own: Path, *, most_bytes: int = MOST_BYTES) -> None:
    """Keeps what was added to `own`, drops what was not used for longest."""
    kept = own.parent
    for program in own.glob(f"*{SUFFIX}"):
        if program.stat().st_nlink == 1:
            os.replace(program, kept / program.name)
    shutil.rmtree(own, ignore_errors=True)
    found = [(path, path.stat()) for path in kept.glob(f"*{SUFFIX}")]
    found.sort(key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime))
    left = sum(about.st_size for _, about in found)
    for path, about in found:
        if left <= most_bytes:
            break
        path.unlink(missing_ok=True)
        left -= about.st_size

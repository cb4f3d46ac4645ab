"""Replaces the model in a directory atomically."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.files.atomic import sync_directory

# Files of an older model that must not mix with the new one.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*",
    "adapter_config.json",  # otherwise a merged adapter would be applied again
    "adapter_model*",
)
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


@contextlib.contextmanager
def replaced_directory(path: Path, *, with_tokenizer: bool) -> Iterator[Path]:
    """Yields a new directory that replaces `path` when the block succeeds.

    At any time, even after a crash, `path` has the old model, the new one or, between
    two renames, none; never a mix. Other files in `path` are kept, and so is the old
    tokenizer if no new one is written. Leftovers of a killed save are removed by the
    next one.

    Args:
        path: the model directory; parents are created.
        with_tokenizer: the block writes tokenizer files.

    Raises:
        ValueError: if `path` is a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a directory")
    staging = path.with_name(f".{path.name}.saving")
    replaced = path.with_name(f".{path.name}.replaced")
    if replaced.exists():  # a save was killed during the swap
        if path.exists():
            _keep_other_files(replaced, path, _MODEL_FILES)
        else:
            replaced.rename(path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for entry in staging.rglob("*"):
            if entry.is_file():
                _flush(entry)
        sync_directory(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if path.exists():
        path.rename(replaced)
    staging.rename(path)
    sync_directory(path.parent)
    if replaced.exists():
        dropped = _MODEL_FILES + (_TOKENIZER_FILES if with_tokenizer else ())
        _keep_other_files(replaced, path, dropped)


def _keep_other_files(source: Path, target: Path, dropped: tuple[str, ...]) -> None:
    """Moves what is neither dropped nor in the target, then removes the source."""
    for entry in list(source.iterdir()):
        is_dropped = any(fnmatch.fnmatch(entry.name, pattern) for pattern in dropped)
        if not is_dropped and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(source)


def _flush(file: Path) -> None:
    """Flushes a file to disk, so that it is complete before the rename."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())

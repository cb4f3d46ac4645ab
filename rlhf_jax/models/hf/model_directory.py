"""Replaces the model in a directory all at once."""

import contextlib
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# What an older model leaves behind, and a new one must not mix with.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*",
    "adapter_config.json",  # else an adapter that is merged is applied once more
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
    """A fresh directory that takes the place of `path` when the block ends well.

    Whoever looks at `path`, at any moment and after any crash, finds the old model, the
    new one or, between two renames, none; never parts of both. Other files that were in
    `path` are there afterwards, as is the old tokenizer if no new one is written.
    Leftovers of a save that was killed are cleaned up by the next.

    Args:
        path: where the model goes; parents are created.
        with_tokenizer: the block writes tokenizer files.

    Raises:
        ValueError: `path` is a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a model is saved into a directory")
    staging = path.with_name(f".{path.name}.saving")
    replaced = path.with_name(f".{path.name}.replaced")
    if replaced.exists():  # a save was killed half-way through the swap
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
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if path.exists():
        path.rename(replaced)
    staging.rename(path)
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
    """Waits until a file is on the disk, so that the rename cannot overtake it."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())

"""Checks the files of a tokenizer before the libraries that read them are called."""

import os
from pathlib import Path

from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.printable import shown
from rlhf_jax.files.regular_file import (
    MEBIBYTE,
    TEMPLATE_BYTES,
    model_file,
    open_regular,
    read_text,
)

VOCABULARY_BYTES = 64 * MEBIBYTE
"""Largest vocabulary; those of 260,000 tokens have half of it."""
VOCABULARY_VALUES = 8_000_000

_CONFIG = "tokenizer_config.json"
_FIELDS = (_CONFIG, "special_tokens_map.json", "config.json", "chat_template.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json")
# Whatever else a class of transformers may open.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".spm", ".bpe", ".tiktoken", ".py")
# Old tools have left these behind; transformers does not open what they name.
_NEVER_OPENED = ("special_tokens_map_file", "tokenizer_file")


def check_tokenizer_files(directory: Path) -> None:
    """Checks size, kind and structure of every file that may be read.

    Raises:
        ValueError: naming the file, if one is no file or leads out of the directory, is
            too large or nested too deeply, is not JSON where it should be, or names a
            file elsewhere.
    """
    templates = directory / "additional_chat_templates"
    for place in (directory, templates) if templates.is_dir() else (directory,):
        for entry in sorted(os.listdir(place)):
            if entry.endswith(_SUFFIXES):
                _check_file(model_file(place, entry))


def _check_file(file: Path) -> None:
    if file.name in _VOCABULARIES:
        read_object(file, most_bytes=VOCABULARY_BYTES, most_values=VOCABULARY_VALUES)
    elif file.name in _FIELDS:
        fields = read_object(file)
        if file.name == _CONFIG:
            _check_names_no_file(file, fields)
    elif file.suffix == ".jinja":
        read_text(file, most_bytes=TEMPLATE_BYTES)
    else:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
        if size > VOCABULARY_BYTES:
            raise ValueError(f"{file}: larger than {VOCABULARY_BYTES:,} bytes")


def _check_names_no_file(file: Path, fields: dict[str, object]) -> None:
    """transformers opens the files that these fields name, wherever they are."""
    for name, value in fields.items():
        is_place = name.endswith("_file") and name not in _NEVER_OPENED
        if (is_place or name == "init_inputs") and value:
            raise ValueError(
                f"{file}: {shown(name)} is {shown(value)}: remove it; a tokenizer's "
                "files are found by their names"
            )

"""The generation config of a checkpoint, in particular its EOS ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.printable import shown
from rlhf_jax.files.regular_file import model_file
from rlhf_jax.files.typed_fields import MOST_INTEGER

FILE = "generation_config.json"


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint's full `generation_config.json`; empty if there is none.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    return _read(Path(path), FILE)


def read_eos_ids(path: str | Path) -> frozenset[int]:
    """The EOS ids of a checkpoint; empty if there are none.

    They are those of `generation_config.json` or else, as in `transformers`, those of
    `config.json`.

    Raises:
        ValueError: if a file is not a JSON object, or its `eos_token_id` is not an id
            or a list of ids.
    """
    for name in (FILE, "config.json"):
        ids = _eos_ids(Path(path) / name, _read(Path(path), name))
        if ids:
            return ids
    return frozenset()


def _eos_ids(file: Path, config: Mapping[str, Any]) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i <= MOST_INTEGER for i in ids):
        raise ValueError(
            f"{file}: eos_token_id={shown(value)} must be a token id, a list of them "
            "or null"
        )
    return frozenset(ids)


def _read(directory: Path, name: str) -> dict[str, Any]:
    if not (directory / name).exists():
        return {}
    return read_object(model_file(directory, name))

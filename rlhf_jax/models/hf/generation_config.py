"""The generation config of a checkpoint, in particular its EOS ids."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "generation_config.json"


def read_generation_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint's full `generation_config.json`; empty if there is none.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    file = Path(path) / FILE
    return _read(file) if file.is_file() else {}


def read_eos_ids(path: str | Path) -> frozenset[int]:
    """The EOS ids of a checkpoint; empty if there are none.

    They are those of `generation_config.json` or else, as in `transformers`, those of
    `config.json`.

    Raises:
        ValueError: if a file is not a JSON object, or its `eos_token_id` is not an id
            or a list of ids.
    """
    for file in (Path(path) / FILE, Path(path) / "config.json"):
        ids = _eos_ids(file, _read(file)) if file.is_file() else frozenset()
        if ids:
            return ids
    return frozenset()


def _eos_ids(file: Path, config: Mapping[str, Any]) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(
            f"{file}: eos_token_id={value!r} must be a token id, a list of them or null"
        )
    return frozenset(ids)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not valid JSON: {reason}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must contain one JSON object")
    return config

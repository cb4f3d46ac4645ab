"""What a checkpoint says of itself: its step, its leaves and the data of the run."""

from pathlib import Path
from typing import Any

from rlhf_jax.files.bounded_json import parse_json
from rlhf_jax.files.printable import shown
from rlhf_jax.files.regular_file import MEBIBYTE, read_text

FORMAT = 2  # 1 had no checksums
_MOST_BYTES = 64 * MEBIBYTE


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, as Orbax wrote it.

    Raises:
        ValueError: if it cannot be read, or is of another step than the folder's name.
    """
    file = folder / "meta" / "metadata"
    text = read_text(file, most_bytes=_MOST_BYTES)
    # Counters may be infinite, and the name of a file may have no UTF-8 form.
    meta = parse_json(
        text, str(file), most_values=_MOST_BYTES, finite=False, encodable=False
    )
    if not _is_whole(meta):
        raise ValueError("no metadata")
    step = meta.get("step", int(folder.name))
    if step != int(folder.name):
        raise ValueError(f"it is the checkpoint of step {shown(step)}")
    return meta


def _is_whole(meta: Any) -> bool:
    if not isinstance(meta, dict) or not isinstance(meta.get("data"), dict):
        return False
    leaves = meta.get("leaves")
    return isinstance(leaves, dict) and all(
        isinstance(leaf, dict) and {"shape", "dtype"} <= leaf.keys()
        for leaf in leaves.values()
    )

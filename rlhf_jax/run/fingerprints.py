"""What a run reads and its checkpoints do not include, and whether it has changed."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from rlhf_jax.config.run import RunConfig
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.models.hf.hub import TOKENIZER_FILES, local_directory

_BLOCK_BYTES = 4096
_WEIGHT_BLOCKS = 64
_WHOLE = 2**30  # bytes; larger data files are sampled
_DATA_BLOCKS = 2**16
# generation_config.json has the other stop tokens.
_TOKENIZATION_FILES = (*TOKENIZER_FILES, "generation_config.json")
_CONFIG_FILES = ("config.json", "adapter_config.json")

_NAMED_ONLY = ("code", "reward")
"""Changed to mend a run, so they do not have to be accepted."""


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Digests by name: data files, tokenizer, models that are not saved, and code."""
    found = {
        option: data_digest(Path(path))
        for option, path in config.input_files().items()
        if path is not None
    }
    tokenizer = config.tokenizer_source()
    if tokenizer is not None:
        checkpoint = open_checkpoint(tokenizer, weights=False)
        directories = (checkpoint.directory, checkpoint.tokenizer_directory)
        digests = [_files_digest(path, _TOKENIZATION_FILES) for path in directories]
        found["tokenizer"] = "-".join(dict.fromkeys(digests))
    for option, path in config.unsaved_models().items():
        if path is not None:
            digests = [weights_digest(path) for path in _directories(option, path)]
            found[f"weights of {option}"] = "-".join(digests)
    for spec in config.reward_files():
        found[f"reward {spec}"] = data_digest(Path(spec.rpartition(":")[0]))
    return found | {"code": code_digest()}


def changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose digests differ; names that one of them lacks are ignored."""
    return [name for name in now if name in saved and saved[name] != now[name]]


def check_unchanged(
    saved: Mapping[str, str],
    now: Mapping[str, str],
    *,
    accepted: Sequence[str],
    run_dir: Path,
) -> list[str]:
    """The changes to name and accept, after checking that the others are accepted.

    Args:
        saved: fingerprints in the checkpoint.
        now: those of the files that are there.
        accepted: first words of names that may have changed.
        run_dir: run directory, for the message.

    Raises:
        ValueError: naming what else has changed.
    """
    changed = changes(saved, now)
    free = {*accepted, *_NAMED_ONLY}
    refused = [name for name in changed if name.split()[0] not in free]
    if refused:
        flags = " ".join(dict.fromkeys(name.split()[0] for name in refused))
        raise ValueError(
            f"cannot resume --run-dir {run_dir}: {', '.join(refused)} changed since "
            "the checkpoint was saved; restore what was there, start a new run, or "
            f"accept it with --accept-changed {flags}"
        )
    return changed


def _directories(option: str, path: str) -> list[Path]:
    """The directories of a model's weights: its own and, of an adapter, its base's."""
    if option == "lora.adapter":  # its base is the run's model
        return [local_directory(path)]
    checkpoint = open_checkpoint(path)
    return list(dict.fromkeys([checkpoint.own_directory, checkpoint.directory]))


def weights_digest(directory: Path) -> str:
    """A digest of the safetensors files of a directory and of what is computed with
    them; empty if there are none.

    Hashes the name and size of each file and evenly spaced blocks of it, which any
    training step changes. It is fast for models of any size.
    """
    digest = hashlib.sha256(_files_digest(directory, _CONFIG_FILES).encode())
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        _add_blocks(digest, path, path.name, _WEIGHT_BLOCKS)
    return digest.hexdigest()[:16] if files else ""


def data_digest(path: Path) -> str:
    """A digest of a file; empty if there is none.

    Of files above 1 GiB, size and evenly spaced blocks; of others every byte.
    """
    if not path.is_file():
        return ""
    status = path.stat()
    return _data_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # a start asks before and after the models are loaded
def _data_digest(path: Path, size: int, modified: int) -> str:
    if size <= _WHOLE:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    digest = hashlib.sha256()
    _add_blocks(digest, path, "", _DATA_BLOCKS)
    return digest.hexdigest()[:16]


@functools.cache
def code_digest() -> str:
    """A digest of this library's source, and the version of JAX."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"source {digest.hexdigest()[:8]}, jax {jax.__version__}"


def _files_digest(directory: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    files = [directory / name for name in names if (directory / name).is_file()]
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16] if files else ""


def _add_blocks(digest: "hashlib._Hash", path: Path, name: str, blocks: int) -> None:
    size = path.stat().st_size
    digest.update(f"{name} {size}\n".encode())
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek(number * max(0, size - _BLOCK_BYTES) // (blocks - 1))
            digest.update(file.read(_BLOCK_BYTES))

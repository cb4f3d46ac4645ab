"""Hugging Face Hub names, accepted wherever a model directory is expected."""

import functools
import re
from pathlib import Path

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# The files of a checkpoint that are used. Pickles and code are not downloaded.
WANTED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    *TOKENIZER_FILES,
)


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model, downloaded from the Hub if necessary.

    Files are stored in the cache shared by all Hugging Face libraries, and resolved
    once per process, so a run uses a single revision.

    Args:
        path: a local directory, which takes precedence, or `"org/name"`, or
            `"org/name@revision"` with a branch, tag or commit.
        weights: also download the weights.

    Returns:
        A local directory; if `path` is neither, `path` itself, so that the loader
        reports the error.

    Raises:
        ValueError: if there is no such model, access is denied, or it is neither on the
            Hub nor in the cache; with the fix.
    """
    local = Path(path)
    name = None if local.exists() else _NAME.fullmatch(str(path))
    if name is None:
        return local
    return _download(name["repo"], name["revision"], weights)


@functools.cache
def _download(repo: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = repo if revision is None else f"{repo}@{revision}"
    hint = f"{name!r} is not a directory, and"
    try:
        directory = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(WANTED),
                # Patterns match inside folders.
                ignore_patterns=["*/*"] if weights else ["*/*", "*.safetensors"],
            )
        )
    except errors.GatedRepoError:
        problem = (
            f"{name!r} is gated: accept its terms at https://huggingface.co/{repo} and "
            "run `hf auth login`"
        )
    except errors.RepositoryNotFoundError:
        problem = (
            f"{hint} the Hugging Face Hub has no such model; check the spelling, or "
            "run `hf auth login` if it is private"
        )
    except errors.RevisionNotFoundError:
        problem = f"the model {repo!r} has no revision {revision!r}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            f"{hint} the Hugging Face Hub cannot be reached and the local cache does "
            f"not have the model; run `hf download {repo}` while online, or check "
            "HF_HUB_OFFLINE and HF_HOME"
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"{hint} downloading it from the Hugging Face Hub failed: {reason}"
    else:
        return _checked(name, directory) if weights else directory
    raise ValueError(problem)


def _checked(name: str, directory: Path) -> Path:
    """The snapshot, if it has a loadable model."""
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"the model {name!r} has no safetensors files; pickles are never "
            "downloaded: use a converted revision or copy"
        )
    return directory

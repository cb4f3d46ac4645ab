"""Models of the Hugging Face Hub by name, wherever a directory of one is expected."""

import functools
import re
from pathlib import Path

_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")

# What is read of a checkpoint. Pickles and code are not even downloaded.
WANTED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
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


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: the one that is there, or a download from the Hub.

    Files land in the cache that all Hugging Face libraries share, and are asked for
    once per process: a whole run reads one revision.

    Args:
        path: a local directory, which always wins, or `"org/name"`, or
            `"org/name@revision"` with a branch, a tag or a commit of that name.
        weights: download them, too.

    Returns:
        A local directory; where `path` is neither, `path` itself, for the reader to
        complain about.

    Raises:
        ValueError: there is no such model, it is not for this reader, or it can be had
            neither from the Hub nor from the cache; saying what to do.
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
    hint = f"{name!r} is no directory here, and"
    try:
        directory = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(WANTED),
                # Patterns reach into folders.
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
            f"{hint} the Hugging Face Hub shows no such model; check the spelling, or "
            "run `hf auth login` if it is private"
        )
    except errors.RevisionNotFoundError:
        problem = f"the model {repo!r} has no revision {revision!r}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            f"{hint} the Hugging Face Hub cannot be reached and its cache here lacks "
            f"the model; run `hf download {repo}` with a connection, or check "
            "HF_HUB_OFFLINE and HF_HOME"
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = f"{hint} it could not be had from the Hugging Face Hub: {reason}"
    else:
        return _checked(name, directory) if weights else directory
    raise ValueError(problem)


def _checked(name: str, directory: Path) -> Path:
    """The snapshot, if it holds a model that can be read."""
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"the model {name!r} has no safetensors files; pickles are never "
            "downloaded: take a revision or a copy that has been converted"
        )
    return directory

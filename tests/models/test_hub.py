"""Models by name on the Hub: what is asked for, and what is said when it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import errors

from rlhf_jax.models import load_pretrained, load_tokenizer, save_pretrained
from rlhf_jax.models.hf import hub
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.tiny import byte_tokenizer, tiny_llama

NAME = "some-org/tiny.llama-1"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """A Hub with one model; the calls to it."""
    module, params = tiny_llama()
    save_pretrained(tmp_path / "snapshot", module, params, tokenizer=byte_tokenizer())
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    hub._download.cache_clear()
    yield asked
    hub._download.cache_clear()


def test_a_name_is_a_model(calls):
    module, params = load_pretrained(NAME)
    load_tokenizer(NAME)
    want_module, want = tiny_llama()
    assert module == want_module
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert [(repo, options["revision"]) for repo, options in calls] == [(NAME, None)]


def test_revisions(calls, tmp_path):
    assert local_directory(f"{NAME}@refs/pr/3") == tmp_path / "snapshot"
    local_directory(f"{NAME}@v1.0")
    local_directory(f"{NAME}@v1.0")  # asked for once
    assert [(repo, options["revision"]) for repo, options in calls] == [
        (NAME, "refs/pr/3"),
        (NAME, "v1.0"),
    ]


def test_without_weights(calls, tmp_path):
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    assert local_directory(NAME, weights=False) == tmp_path / "snapshot"
    kept = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "model.safetensors", "model.safetensors.index.json"],
        allow_patterns=calls[0][1]["allow_patterns"],
        ignore_patterns=calls[0][1]["ignore_patterns"],
    )
    assert list(kept) == ["config.json", "model.safetensors.index.json"]


def test_only_what_is_read_is_downloaded(calls):
    local_directory(NAME)
    files = [
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "chat_template.jinja", "adapter_model.safetensors",
    ]  # fmt: skip
    refused = [
        "pytorch_model.bin", "model.bin", "modeling_x.py", "tokenizer.py", "README.md",
        "original/model.safetensors", "onnx/config.json", "consolidated.safetensors",
        "training_args.bin", "model.fp16.safetensors",
    ]  # fmt: skip
    options = calls[0][1]
    kept = huggingface_hub.utils.filter_repo_objects(
        files + refused,
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(kept) == files


@pytest.mark.parametrize(
    "path",
    ["runs", "runs/sft/model", "./some-org/x", "/some-org/x", "../x", "a/b/c@d", "x@y"],
)
def test_what_is_no_name(path, calls):
    assert local_directory(path) == Path(path)
    assert calls == []


def test_a_directory_wins(calls, tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert local_directory(NAME) == Path(NAME)
    assert calls == []
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_pretrained(NAME)


def made(error, text):
    """Without the response that some want, whose class is that of another library."""
    return error.__new__(error, text)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            made(errors.GatedRepoError, "403\nlong"),
            "is gated: accept its terms at https://huggingface.co/some-org/x and run",
        ),
        (
            made(errors.RepositoryNotFoundError, "404\nlong"),
            "'some-org/x@v2' is not a directory, and .* no such model; .*private",
        ),
        (
            made(errors.RevisionNotFoundError, "404\nlong"),
            "the model 'some-org/x' has no revision 'v2'",
        ),
        (
            errors.LocalEntryNotFoundError("offline\nlong"),
            "cannot be reached .* run `hf download some-org/x` while online",
        ),
        (errors.OfflineModeIsEnabled("offline"), "check HF_HUB_OFFLINE and HF_HOME"),
        (
            OSError("500\nlong"),
            "downloading it from the Hugging Face Hub failed: 500 long",
        ),
        (made(errors.HfHubHTTPError, ""), "Hub failed: HfHubHTTPError"),
    ],
)
def test_what_fails_is_said_in_one_line(error, message, calls, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as raised:
        local_directory("some-org/x@v2")
    assert "\n" not in str(raised.value)


def test_a_model_of_pickles_only(calls, tmp_path):
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no safetensors files; pickles are never"):
        local_directory(NAME)


# The library itself, without a network


def generate(home, *flags):
    return subprocess.run(
        [sys.executable, "-m", "rlhf_jax.cli", "generate", "--prompt", "hi", *flags],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_offline(tmp_path):
    done = generate(tmp_path, "--model", NAME)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rlhf-jax: error: '{NAME}' is not a directory, and the")
    assert f"`hf download {NAME}`" in line


def test_offline_from_the_cache(tmp_path):
    module, params = tiny_llama()
    cached = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    save_pretrained(
        cached / "snapshots" / "c0ffee", module, params, tokenizer=byte_tokenizer()
    )
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    flags = ["--max-new-tokens", "4", "--temperature", "0"]
    done = generate(tmp_path, "--model", NAME, *flags)
    assert done.returncode == 0, done.stderr
    shutil.move(cached / "snapshots" / "c0ffee", tmp_path / "local")
    local = generate(tmp_path, "--model", str(tmp_path / "local"), *flags)
    assert done.stdout.replace(NAME, "x") == local.stdout.replace(
        str(tmp_path / "local"), "x"
    )

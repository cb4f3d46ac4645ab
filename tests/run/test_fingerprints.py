"""`fingerprints.py`: what tells one file from another, and what a change means."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.run.fingerprints import (
    check_unchanged,
    data_digest,
    fingerprints,
    weights_digest,
)


@pytest.fixture
def weights(tmp_path):
    """Writes `name` with a number for every weight, a megabyte of them."""

    def write(name, value, file="model.safetensors"):
        (tmp_path / name).mkdir(exist_ok=True)
        weights = np.full(2**18, value, np.float32)
        save_file({"x": weights}, tmp_path / name / file)
        return tmp_path / name

    return write


def test_copies_have_one_and_others_another(weights):
    assert weights_digest(weights("a", 1.0)) == weights_digest(weights("b", 1.0))
    assert weights_digest(weights("a", 1.0)) != weights_digest(weights("b", 1.5))
    other_name = weights("c", 1.0, file="model-00001-of-00001.safetensors")
    assert weights_digest(weights("a", 1.0)) != weights_digest(other_name)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_the_same_weights_in_another_computation_have_another(weights, name):
    plain, scaled = weights("a", 1.0), weights("b", 1.0)
    (plain / name).write_text('{"lora_alpha": 8}')
    (scaled / name).write_text('{"lora_alpha": 8}')
    assert weights_digest(plain) == weights_digest(scaled)
    (scaled / name).write_text('{"lora_alpha": 9}')
    assert weights_digest(plain) != weights_digest(scaled)


def test_other_stop_tokens_are_a_change(stages, tmp_path):
    policy = shutil.copytree(stages.ppo.policy, tmp_path / "policy")
    config = dataclasses.replace(stages.ppo, policy=str(policy))
    before = fingerprints(config)
    (policy / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    now = fingerprints(config)
    assert [name for name in now if now[name] != before[name]] == ["tokenizer"]


def test_the_base_of_an_adapter_is_part_of_it(stages, tmp_path):
    base = shutil.copytree(stages.ppo.policy, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    about["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    save_file({"x": np.zeros(3)}, adapter / "adapter_model.safetensors")
    config = dataclasses.replace(stages.ppo, policy=str(adapter))
    before = fingerprints(config)
    save_file({"x": np.ones(3)}, base / "model.safetensors")
    (base / "tokenizer.json").write_text("{}")
    now = fingerprints(config)
    changed = [name for name in now if now[name] != before[name]]
    assert changed == ["tokenizer", "weights of policy"]


def test_directories_without_weights_have_none(tmp_path):
    assert weights_digest(tmp_path) == weights_digest(tmp_path / "nowhere") == ""


def test_shuffled_rows_have_another_digest(tmp_path):
    rows = [f'{{"text": "{number}"}}\n' for number in range(100)]
    (tmp_path / "a").write_text("".join(rows))
    (tmp_path / "b").write_text("".join(rows))
    (tmp_path / "c").write_text("".join([*rows[50:], *rows[:50]]))
    assert data_digest(tmp_path / "a") == data_digest(tmp_path / "b")
    assert data_digest(tmp_path / "a") != data_digest(tmp_path / "c")
    assert data_digest(tmp_path / "none") == ""


def test_a_file_written_again_is_read_again(tmp_path):
    path = tmp_path / "a"
    path.write_text("one\n")
    first = data_digest(path)
    path.write_text("two\n")
    os.utime(path, ns=(1, 1))
    assert data_digest(path) != first


def test_large_files_are_sampled_within_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_jax.run.fingerprints._WHOLE", 1000)
    path = tmp_path / "a"
    digests = set()
    for content in (b"a" * 9000, b"a" * 8999 + b"b", b"b" + b"a" * 8999, b"a" * 9001):
        path.write_bytes(content)
        digests.add(data_digest(path))
    assert len(digests) == 4


SAVED = {"data": "1", "tokenizer": "2", "weights of policy": "3", "code": "4"}


@pytest.mark.parametrize(
    ("now", "accepted", "changed"),
    [
        (SAVED, (), []),
        (SAVED | {"code": "5"}, (), ["code"]),  # named, but an update may be the cure
        (SAVED | {"data": "5"}, ("data",), ["data"]),
        (SAVED | {"weights of policy": "5"}, ("weights",), ["weights of policy"]),
        ({"eval-data": "5"}, (), []),  # not known when the checkpoint was saved
    ],
)
def test_changes_are_named(tmp_path, now, accepted, changed):
    got = check_unchanged(SAVED, now, accepted=accepted, run_dir=tmp_path)
    assert got == changed


def test_changes_are_refused_with_the_flag_to_accept_them(tmp_path):
    now = SAVED | {"data": "5", "weights of policy": "6", "tokenizer": "7"}
    with pytest.raises(
        ValueError,
        match=r"resume .*: data, weights of policy changed since .* "
        "--accept-changed data weights$",
    ):
        check_unchanged(SAVED, now, accepted=("tokenizer",), run_dir=tmp_path)

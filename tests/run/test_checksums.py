"""No flipped bit in a checkpoint is restored in silence."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.run import checksums
from rlhf_jax.run.checkpointer import Checkpointer

STATE = {
    "params": jnp.arange(300.0).reshape(20, 15),
    "moments": {"mu": jnp.ones((20, 15), jnp.bfloat16), "count": jnp.int32(7)},
}
DATA = {"step": 3, "counters": {"rollout/tokens": 477.0}}


@pytest.fixture
def checkpoint(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, STATE, DATA)
    return tmp_path / "3"


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def restored(checkpoint):
    """The state and data, or None if the damage is noticed."""
    with Checkpointer(checkpoint.parent) as checkpointer:
        if checkpointer.damage(3) is not None:
            return None
        try:
            return checkpointer.restore(3, STATE)
        except ValueError:
            return None


def is_as_saved(found):
    state, data = found
    return (
        data == DATA
        and np.array_equal(state["params"], STATE["params"])
        and np.array_equal(state["moments"]["mu"], STATE["moments"]["mu"])
        and state["moments"]["count"] == 7
    )


def test_200_flipped_bits(checkpoint):
    assert is_as_saved(restored(checkpoint))
    draw = np.random.default_rng(0)
    paths = files(checkpoint)
    assert len(paths) > 8
    noticed = 0
    for number in range(200):
        path = paths[number % len(paths)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.integers(len(bad))] ^= 1 << draw.integers(8)
        path.write_bytes(bad)
        found = restored(checkpoint)
        noticed += found is None
        assert found is None or is_as_saved(found), path
        path.write_bytes(good)
    assert noticed > 150  # others are in files that restoring does not read
    assert is_as_saved(restored(checkpoint))


def test_every_missing_empty_or_additional_file_is_named(checkpoint):
    for path in files(checkpoint):
        good, name = path.read_bytes(), path.relative_to(checkpoint).as_posix()
        if "/" not in name and name != checksums.NAME:
            continue  # Orbax's own notes; restoring does not read them
        path.unlink()
        reason = checksums.damage(checkpoint)
        assert reason == f"{name} is missing"
        path.write_bytes(b"")
        reason = checksums.damage(checkpoint)
        assert reason is not None
        assert name in reason
        path.write_bytes(good)
    (checkpoint / "state" / "more").write_bytes(b"")
    assert checksums.damage(checkpoint) == "state/more does not belong to it"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"size": 1}}', "1"])
def test_a_damaged_list_of_checksums_is_damage(checkpoint, text):
    (checkpoint / checksums.NAME).write_text(text)
    assert "checksums.json" in checksums.damage(checkpoint)


def test_a_checkpoint_without_its_checksums_is_damaged(checkpoint):
    (checkpoint / checksums.NAME).unlink()
    with Checkpointer(checkpoint.parent) as checkpointer:
        assert checkpointer.damage(3) == "checksums.json is missing"
    (checkpoint.parent / "99").mkdir()
    with Checkpointer(checkpoint.parent) as checkpointer:
        assert checkpointer.damage(99) == "it is incomplete"


def test_a_checkpoint_under_the_name_of_another_is_damaged(checkpoint):
    os.rename(checkpoint, checkpoint.with_name("8"))
    with Checkpointer(checkpoint.parent) as checkpointer:
        assert checkpointer.damage(8) == "it is the checkpoint of step 3"
        with pytest.raises(ValueError, match="it is the checkpoint of step 3"):
            checkpointer.data(8)


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("checksums.json", _pipe),  # opening it would wait for a writer
        ("checksums.json", lambda path: path.write_text("[" * 100_000)),
        ("meta/metadata", _pipe),
        ("meta/metadata", lambda path: path.write_text("[" * 100_000)),
        ("meta/metadata", lambda path: path.write_text('{"leaves": 1, "data": {}}')),
    ],
)
def test_a_file_that_is_none_or_too_deep_is_damage(checkpoint, file, spoil):
    spoil(checkpoint / file)
    with Checkpointer(checkpoint.parent) as checkpointer:
        assert checkpointer.damage(3) is not None
        if file != checksums.NAME:
            with pytest.raises(ValueError, match="is damaged"):
                checkpointer.data(3)


def test_a_file_that_the_disk_cannot_read_is_damage(checkpoint, monkeypatch):
    def failing(*_):
        raise error

    monkeypatch.setattr("hashlib.file_digest", failing)
    error = OSError(5, "Input/output error")
    reason = checksums.damage(checkpoint)
    assert reason is not None
    assert reason.endswith(" cannot be read: Input/output error")
    error = PermissionError(13, "Permission denied")  # can be repaired
    with pytest.raises(PermissionError):
        checksums.damage(checkpoint)

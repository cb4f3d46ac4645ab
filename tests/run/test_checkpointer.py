"""Checkpoints survive kills, other meshes and donation; what does not fit fails."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.run import checksums
from rlhf_jax.run.checkpointer import Checkpointer, Keep
from rlhf_jax.run.write_failures import reason


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: dict
    opt: tuple
    key: jax.Array
    step: jax.Array


def make_state(key=None):
    weights = np.arange(64, dtype=np.float32).reshape(8, 8)
    return State(
        params={"layers": [{"w": jnp.asarray(weights)}], "b": jnp.float32(1 / 3)},
        opt=(
            Moments(
                count=jnp.int32(7),
                mu={
                    "w": jnp.asarray(-weights, jnp.bfloat16),
                    "none": jnp.zeros((0, 4)),
                },
            ),
            None,
        ),
        key=jax.random.key(3) if key is None else key,
        step=jnp.int32(41),
    )


def raw(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


def mesh(*shape):
    names = ("data", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize(
    "key",
    [
        jax.random.key(3),
        jax.random.key(4, impl="rbg"),
        jax.random.split(jax.random.key(5), 3),
    ],
    ids=["threefry", "rbg", "several"],
)
def test_state_comes_back_bit_for_bit(tmp_path, key):
    state = make_state(key)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(41, state, {"record": 99, "share": 0.1, "name": "train"})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 41
        got, data = checkpointer.restore(41, make_state(key))
    assert_same(got, state)
    assert data == {"record": 99, "share": 0.1, "name": "train"}
    draws = [jax.vmap(jax.random.bits)(jnp.atleast_1d(k)) for k in (got.key, key)]
    np.testing.assert_array_equal(*draws)


def test_restores_onto_another_mesh(tmp_path):
    state = make_state()
    by_row = NamedSharding(mesh(8), PartitionSpec("data"))
    weights = jax.device_put(state.params["layers"][0]["w"], by_row)
    state.params["layers"][0]["w"] = weights
    other = mesh(2, 4)
    replicated = NamedSharding(other, PartitionSpec())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
    )
    by_block = NamedSharding(other, PartitionSpec("data", "tensor"))
    like.params["layers"][0]["w"] = jax.ShapeDtypeStruct(
        (8, 8), jnp.float32, sharding=by_block
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        got, _ = checkpointer.restore(1, like)
    assert_same(got, state)
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
    blocks = got.params["layers"][0]["w"].addressable_shards
    assert [block.data.shape for block in blocks] == [(4, 2)] * 8


def test_uncommitted_state_stays_usable_beside_arrays_on_a_mesh(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        got, _ = checkpointer.restore(1, state)
    batch = jax.device_put(
        np.ones((8, 8)), NamedSharding(mesh(8), PartitionSpec("data"))
    )
    total = jax.jit(lambda s, x: (s.params["layers"][0]["w"] * x).sum())(got, batch)
    assert total == 2016  # 0 + 1 + … + 63
    assert not any(leaf.committed for leaf in jax.tree.leaves(got))


def test_saved_values_are_those_of_the_call_although_the_state_is_donated(tmp_path):
    add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add_one(jnp.zeros((512, 512)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": x}, {})
        for _ in range(20):
            x = add_one(x)
        got, _ = checkpointer.restore(1, {"x": x})
    np.testing.assert_array_equal(got["x"], np.ones((512, 512)))


def test_keeps_the_latest(tmp_path, caplog):
    with Checkpointer(tmp_path, keep=Keep(latest=2)) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (3, 10, 11):
            checkpointer.save(step, {"x": jnp.float32(step)}, {"record": step})
            assert checkpointer.latest_step() == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]
    with Checkpointer(tmp_path) as checkpointer:
        got, data = checkpointer.restore(10, {"x": jnp.float32(0)})
    assert (got["x"], data) == (10, {"record": 10})
    assert [r for r in caplog.records if r.levelname == "WARNING"] == []  # no noise


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"a": {"w": jnp.zeros((2, 4))}, "b": jnp.zeros(3)},
            r"'a/w'.*float32\[2, 3\] th",
        ),
        ({"a": {"w": jnp.zeros((2, 3))}, "b": jnp.zeros(3, jnp.int32)}, "'b'.*int32"),
        ({"a": {"w": jnp.zeros((2, 3))}}, "'b' is float32.*missing here"),
        (
            {"a": {"w": jnp.zeros((2, 3)), "v": jnp.zeros(1)}, "b": jnp.zeros(2)},
            r"'a/v' is missing there and float32\[1\] here \(1 more leaves differ\)",
        ),
    ],
    ids=["shape", "dtype", "left over", "missing"],
)
def test_another_structure_is_refused_in_one_line_that_names_the_leaf(
    tmp_path, like, message
):
    state = {"a": {"w": jnp.zeros((2, 3))}, "b": jnp.zeros(3)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        with pytest.raises(ValueError, match=message) as caught:
            checkpointer.restore(1, like)
    assert "\n" not in str(caught.value)


def test_another_kind_of_key_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match=r"'key' is key<fry>\[\] there.*rbg"):
            checkpointer.restore(1, {"key": jax.random.key(0, impl="rbg")})


def test_later_checkpoints_make_way_for_new_ones(tmp_path):
    with Checkpointer(tmp_path, keep=Keep(latest=3)) as checkpointer:
        for step in (3, 10, 11):
            checkpointer.save(step, {"x": jnp.float32(step)}, {})
        assert checkpointer.steps() == [3, 10, 11]
        checkpointer.remove_after(11)
        assert checkpointer.steps() == [3, 10, 11]
        checkpointer.remove_after(3)
        assert checkpointer.steps() == [3]
        checkpointer.save(4, {"x": jnp.float32(4)}, {})
        assert checkpointer.restore(4, {"x": jnp.float32(0)})[0]["x"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_a_kill_while_checkpoints_are_removed_leaves_complete_ones(
    tmp_path, monkeypatch
):
    state = {"x": jnp.float32(1)}
    with Checkpointer(tmp_path, keep=Keep(latest=3)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, {})

    def kill(path, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            Checkpointer(tmp_path).remove_after(1)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        checkpointer.restore(2, state)
        checkpointer.remove_after(1)
        checkpointer.save(3, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_misuse_is_refused(tmp_path):
    state = {"x": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"keep\.latest=0"):
        Checkpointer(tmp_path, keep=Keep(latest=0))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, {})
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step {step} .*latest .*step 5"):
                checkpointer.save(step, state, {})
        with pytest.raises(ValueError, match=r"no checkpoint of step 6 .*\[5\]"):
            checkpointer.restore(6, state)
        with pytest.raises(ValueError, match=r"leaf 'x' .* 0\.5"):
            checkpointer.save(6, {"x": 0.5}, {})
        with pytest.raises(ValueError, match="named 'a/b'"):
            checkpointer.save(6, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {})


def test_a_failed_write_raises(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    with pytest.raises(OSError):
        checkpointer.save(1, {"x": jnp.zeros(2)}, {})


SAVE_FOREVER = """
import itertools, sys
import jax.numpy as jnp
from rlhf_jax.run.checkpointer import Checkpointer, Keep

with Checkpointer(sys.argv[1], keep=Keep(latest=2)) as checkpointer:
    first = (checkpointer.latest_step() or 0) + 1
    for step in itertools.count(first):
        state = {str(i): jnp.full((64, 64), step, jnp.float32) for i in range(8)}
        checkpointer.save(step, state, {"record": 10 * step})
        print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_complete_latest_checkpoint(tmp_path):
    like = {str(i): jnp.zeros((64, 64)) for i in range(8)}
    delays = np.random.default_rng(0).uniform(0.0, 0.1, size=3)
    latest = 0
    for delay in delays:
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
        )
        assert saver.stdout is not None
        for _ in range(3):  # two commits are certain once the third save has begun
            saver.stdout.readline()
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        with Checkpointer(tmp_path) as checkpointer:
            step = checkpointer.latest_step()
            assert step is not None
            assert step >= latest + 2
            state, data = checkpointer.restore(step, like)
        assert data == {"record": 10 * step}
        for leaf in state.values():
            np.testing.assert_array_equal(leaf, np.full((64, 64), step))
        latest = step


def test_what_a_kill_after_the_last_save_left_can_be_removed(tmp_path):
    with Checkpointer(tmp_path, keep=Keep(latest=5)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.zeros(2)}, {}, values={"a": -step})
    (tmp_path / "0.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(tmp_path, keep=Keep(latest=1)) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3]
    with Checkpointer(tmp_path, keep=Keep(latest=1)) as checkpointer:
        checkpointer.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_half_written_checkpoints_are_not_listed_and_the_next_save_removes_them(
    tmp_path,
):
    state = {"x": jnp.zeros(2)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
    half = tmp_path / "2.orbax-checkpoint-tmp"  # as a kill leaves it
    half.mkdir()
    (half / "state.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(tmp_path) as reader:
        assert reader.latest_step() == 1
        reader.restore(1, state)
        assert half.exists()  # it may belong to a process that is still writing
    with Checkpointer(tmp_path) as writer:
        writer.save(3, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_only_names_that_it_writes_are_checkpoints(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, make_state(), {})
    # The last ones are decimal digits too: an Arabic 9, and a 9 of 250 digits.
    for name in ("007", "-1", "1e3", " 8", "\u0669", "9" * 250):
        (tmp_path / name).mkdir()
    (tmp_path / "30").write_text("a file")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [7]


def test_a_full_disk_is_named_and_what_was_written_is_removed(tmp_path, monkeypatch):
    def fail(*_):
        # As TensorStore says it, shortened.
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "params/0.0" in OCDBT database: Failed '
            "to write 224349 bytes to file 20: No space [os_error_code='28']"
        )

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), {})
        checkpointer.wait()
        monkeypatch.setattr("rlhf_jax.run.checksums.write_checksums", fail)
        checkpointer.save(2, make_state(), {})
        with pytest.raises(OSError, match=r"checkpoint 2 cannot.*: No space left on"):
            checkpointer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_failed_write_is_one_line_and_leaves_the_earlier_ones(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    with Checkpointer(tmp_path, keep=Keep(latest=1)) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(3)}, {})
        checkpointer.wait()
        monkeypatch.setattr(checksums, "write_checksums", Mock(side_effect=full))
        checkpointer.save(2, {"x": jnp.zeros(3)}, {})
        with pytest.raises(
            OSError, match=r"^checkpoint 2 cannot .*space left .*whole"
        ) as told:
            checkpointer.wait()
        assert "\n" not in str(told.value)
        assert checkpointer.steps() == [1]


def test_the_reason_of_a_failed_write_without_the_array_around_it():
    text = 'Error writing "a/b" in database: Failed to write 9 bytes to file 17: No '
    text += "space left on device [os_error_code='28'] [tensorstore_spec='{...}']"
    assert reason(ValueError(text)) == "No space left on device"

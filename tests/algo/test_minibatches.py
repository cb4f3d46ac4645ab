"""`minibatches.py`: a partition, the same for all leaves, and even on the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.minibatches import split_minibatches


def batch(size=12):
    index = jnp.arange(size, dtype=jnp.int32)
    return {
        "index": index,
        "matrix": index[:, None].astype(jnp.float32) + jnp.array([[0.0, 0.25]]),
        "mask": (index % 2 == 0)[:, None, None] & jnp.ones((1, 3, 2), bool),
    }


@pytest.mark.parametrize("num_minibatches", [1, 3, 4, 12])
def test_every_sequence_once_and_whole(maybe_jit, num_minibatches):
    fn = functools.partial(split_minibatches, num_minibatches=num_minibatches)
    got = maybe_jit(fn)(jax.random.key(0), batch())
    index = np.asarray(got["index"])
    assert index.shape == (num_minibatches, 12 // num_minibatches)
    np.testing.assert_array_equal(np.sort(index.ravel()), np.arange(12))
    np.testing.assert_array_equal(got["matrix"][..., 0], index)
    np.testing.assert_array_equal(got["matrix"][..., 1], index + 0.25)
    want = np.broadcast_to((index % 2 == 0)[..., None, None], (*index.shape, 3, 2))
    np.testing.assert_array_equal(got["mask"], want)
    assert {k: v.dtype for k, v in got.items()} == {
        k: v.dtype for k, v in batch().items()
    }


def test_each_minibatch_takes_one_of_every_run_of_neighbours():
    got = split_minibatches(jax.random.key(1), batch(), num_minibatches=3)["index"]
    # Neighbours 0 1 2 | 3 4 5 | …: every minibatch holds one of each four runs.
    np.testing.assert_array_equal(
        np.asarray(got) // 3, np.broadcast_to(np.arange(4), (3, 4))
    )


def test_keys_decide():
    def split(seed):
        key = jax.random.key(seed)
        return np.asarray(split_minibatches(key, batch(), num_minibatches=3)["index"])

    np.testing.assert_array_equal(split(0), split(0))
    assert len({split(seed).tobytes() for seed in range(20)}) == 20


def test_every_assignment_is_equally_likely():
    # Each of a run's 3 sequences goes to each of 3 minibatches a third of the time.
    keys = jax.random.split(jax.random.key(2), 900)
    index = jax.vmap(
        lambda key: split_minibatches(key, jnp.arange(6), num_minibatches=3)
    )(keys)  # [900, 3, 2]
    for minibatch in range(3):
        for run in range(2):
            counts = np.bincount(index[:, minibatch, run], minlength=6)
            counts = counts[3 * run : 3 * run + 3]
            # 300 expected; five standard deviations of a binomial are 71.
            assert counts.sum() == 900 and np.all(np.abs(counts - 300) < 71)


@pytest.mark.parametrize("num_minibatches", [5, 0, 24])
def test_a_wrong_number_is_named(num_minibatches):
    message = f"num_minibatches={num_minibatches}: .* 12 sequences"
    with pytest.raises(ValueError, match=message):
        split_minibatches(jax.random.key(0), batch(), num_minibatches=num_minibatches)


def test_leaves_of_different_length_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        split_minibatches(
            jax.random.key(0), {"a": jnp.zeros(4), "b": jnp.zeros(6)}, num_minibatches=2
        )

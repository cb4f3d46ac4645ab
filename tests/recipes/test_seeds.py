"""All 64 bits of a seed count: seeds that share their lowest 32 give different runs."""

import itertools

import jax
import numpy as np
import pytest
from tiny_stages import TINY

from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.data.batches import Batches, holdout
from rlhf_jax.recipes import sft
from rlhf_jax.recipes.networks import Networks, fresh_shape
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.run.devices import make_mesh

SAME_LOW_BITS = (1, 2**32 + 1, 2**63 + 1)


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, [0, 0]),
        (2**32 - 1, [0, 2**32 - 1]),
        (2**32, [1, 0]),
        (2**63 + 1, [2**31, 1]),
        (2**64 - 1, [2**32 - 1, 2**32 - 1]),
    ],
)
def test_a_key_is_the_high_and_the_low_word(seed, words):
    assert jax.random.key_data(seed_key(seed)).tolist() == words


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_short_seeds_give_the_key_of_jax(seed):
    key = seed_key(seed)
    assert key.dtype == jax.random.key(0).dtype
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(seed))).all()


def test_batches_and_held_out_rows_differ():
    rows = list(range(100))
    splits = {tuple(holdout(rows, 0.3, seed)[1]) for seed in SAME_LOW_BITS}
    batches = [Batches(rows, list, batch_size=50, seed=seed) for seed in SAME_LOW_BITS]
    assert len(splits) == len({tuple(found[0]) for found in batches}) == 3


def test_initial_weights_differ():
    mesh = make_mesh()
    kernels = []
    for seed in SAME_LOW_BITS:
        config = SFTConfig(run_dir="r", data="d", seed=seed)
        shape = fresh_shape(TINY, vocab_size=300)
        params = sft.setup(config, Networks(config, mesh), shape).state.params
        kernels.append(np.concatenate([x.ravel() for x in jax.tree.leaves(params)]))
    for one, other in itertools.combinations(kernels, 2):
        assert np.mean(one == other) < 0.1  # only biases and scales are equal

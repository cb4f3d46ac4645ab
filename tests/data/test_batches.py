"""Order of batches and padding of rows, against arrays written by hand."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.batches import (
    Batches,
    holdout,
    pad_examples,
    pad_pairs,
    pad_prompts,
    pad_rankings,
)
from rlhf_jax.data.encoding import EncodedExample, EncodedPair, EncodedRanking


def tokens(*ids):
    return np.asarray(ids, np.int32)


def example(learnt, *ids):
    """Tokens, of which those marked with 1 are learnt."""
    return EncodedExample(tokens(*ids), np.array([mark == "1" for mark in learnt]))


def batches_of(rows, batch_size, seed=0):
    return Batches(rows, list, batch_size=batch_size, seed=seed)


# Padding.


def test_prompts_are_padded_on_the_left():
    prompts = pad_prompts([tokens(5, 6), tokens(7), tokens(1, 2, 3)], width=3, pad_id=9)
    assert prompts.tokens.tolist() == [[9, 5, 6], [9, 9, 7], [1, 2, 3]]
    assert prompts.lengths.tolist() == [2, 1, 3]


def test_examples_are_padded_on_the_right():
    rows = [example("011", 5, 6, 7), example("11", 8, 9)]
    batch = pad_examples(rows, width=4, pad_id=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch.mask.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
    ]
    assert batch.target_mask.tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]


def test_pairs_are_padded_to_one_width():
    pair = EncodedPair(tokens(5, 6), tokens(5, 7, 8), 0.5)
    batch = pad_pairs([pair], width=4, pad_id=0)
    assert batch.margin is not None and batch.margin.tolist() == [0.5]
    assert batch.chosen.tokens.tolist() == [[5, 6, 0, 0]]
    assert batch.chosen.mask.tolist() == [[True, True, False, False]]
    assert batch.rejected.tokens.tolist() == [[5, 7, 8, 0]]
    assert batch.rejected.mask.tolist() == [[True, True, True, False]]


def test_masks_come_from_lengths_where_pad_is_eos():
    eos = 3
    batch = pad_examples([example("011", 3, 5, 3)], width=5, pad_id=eos)
    assert batch.tokens.tolist() == [[3, 5, 3, 3, 3]]
    assert batch.mask.tolist() == [[True, True, True, False, False]]
    assert batch.target_mask.tolist() == [[False, True, True, False, False]]
    prompts = pad_prompts([tokens(3, 5, 3)], width=4, pad_id=eos)
    assert prompts.lengths.tolist() == [3]
    pairs = pad_pairs([EncodedPair(tokens(5, 3), tokens(3))], width=3, pad_id=eos)
    assert pairs.chosen.mask.sum() == 2 and pairs.rejected.mask.sum() == 1


def test_batches_hold_host_arrays_of_the_declared_types():
    prompts = pad_prompts([tokens(1)], width=2, pad_id=0)
    examples = pad_examples([example("01", 1, 2)], width=2, pad_id=0)
    pairs = pad_pairs([EncodedPair(tokens(1), tokens(2))], width=2, pad_id=0)
    leaves = jax.tree.leaves((prompts, examples, pairs))
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    dtypes = [str(leaf.dtype) for leaf in leaves]
    want = [*["int32"] * 3, *["bool"] * 2, *["int32", "bool"] * 2, "float32"]
    assert dtypes == want


def test_row_wider_than_the_batch():
    with pytest.raises(ValueError, match="width=2: a row has 3 tokens"):
        pad_prompts([tokens(1), tokens(1, 2, 3)], width=2, pad_id=0)


# Order.


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 2**32 - 1))
    )
)
def test_an_epoch_has_every_row_at_most_once(case):
    num_rows, batch_size, seed = case
    batches = batches_of(range(num_rows), batch_size, seed)
    steps = num_rows // batch_size
    assert batches.steps_per_epoch == steps
    assert batches.left_out == num_rows - steps * batch_size
    for epoch in range(3):
        first = epoch * steps
        seen = [row for i in range(steps) for row in batches[first + i]]
        assert len(seen) == steps * batch_size
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(num_rows))


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = {
        tuple(batches_of(range(50), 50, seed)[epoch])
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9 and tuple(range(50)) not in orders


def test_rows_left_out_of_one_epoch_are_not_always_the_same():
    batches = batches_of(range(5), 4)
    left_out = {next(iter(set(range(5)) - set(batches[epoch]))) for epoch in range(60)}
    assert left_out == {0, 1, 2, 3, 4}


def test_orders_are_uniform():
    # 600 orders of 3 rows: each of the 6 is expected 100 times, with a standard
    # deviation of √(600 · 1/6 · 5/6) = 9.1.
    batches = batches_of(range(3), 3)
    orders = [tuple(batches[epoch]) for epoch in range(600)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 63 and max(counts) < 137


def test_resume_is_an_integer():
    whole = batches_of(range(10), 3)
    sequence = [whole[step] for step in range(12)]
    resumed = batches_of(range(10), 3)  # a new process, which begins at step 7
    assert [resumed[step] for step in range(7, 12)] == sequence[7:]
    assert [resumed[step] for step in reversed(range(12))] == sequence[::-1]
    assert resumed[np.int64(7)] == sequence[7]


def test_order_does_not_change_between_releases():
    # A run that resumes after an upgrade must go on with the same batches.
    batches = batches_of(range(10), 3, seed=3)
    assert [batches[step] for step in range(4)] == [
        [0, 5, 1],
        [8, 9, 6],
        [2, 4, 3],
        [8, 3, 4],
    ]


def test_without_a_seed_the_order_is_that_of_the_rows():
    batches = batches_of("abcdefg", 3, seed=None)
    epoch = [["a", "b", "c"], ["d", "e", "f"]]
    assert [batches[step] for step in range(4)] == epoch + epoch
    assert batches.left_out == 1


def test_indices_lead_to_what_belongs_to_a_row():
    batches = batches_of("abcdefg", 3)
    for step in range(5):
        assert ["abcdefg"[i] for i in batches.indices(step)] == batches[step]


def test_only_the_rows_of_a_batch_are_read():
    class Squares:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            read.append(index)
            return index**2

    read = []
    batches = Batches(Squares(), list, batch_size=4, seed=0)
    assert not read
    assert batches[30] == [index**2 for index in read] and len(read) == 4


@pytest.mark.parametrize(("num_rows", "batch_size"), [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_batch_size_that_does_not_fit(num_rows, batch_size):
    expected = f"batch_size={batch_size}: the dataset has {num_rows} rows"
    with pytest.raises(ValueError, match=expected):
        batches_of(range(num_rows), batch_size)


def test_wrong_steps_and_seeds():
    batches = batches_of(range(3), 2)
    with pytest.raises(IndexError, match="step -1"):
        batches[-1]
    with pytest.raises(TypeError):
        batches[0.5]
    with pytest.raises(ValueError, match="seed=-1: at least 0"):
        batches_of(range(3), 2, seed=-1)
    with pytest.raises(ValueError, match="seed=-1: at least 0"):
        holdout(range(10), 0.5, seed=-1)


# Held-out rows.


def test_holdout_parts_the_rows_and_keeps_their_order():
    rows = list("abcdefghij")
    train, held_out = holdout(rows, 0.3, seed=1)
    assert len(train) == 7 and len(held_out) == 3
    assert sorted(train + held_out) == rows
    assert train == sorted(train) and held_out == sorted(held_out)
    assert holdout(rows, 0.3, seed=1) == (train, held_out)
    assert len({tuple(holdout(rows, 0.3, seed=seed)[1]) for seed in range(20)}) > 10


def test_holdout_of_nothing():
    assert holdout("abc", 0, seed=0) == (["a", "b", "c"], [])


@pytest.mark.parametrize("fraction", [0.04, 0.96])
def test_holdout_that_leaves_one_part_empty(fraction):
    with pytest.raises(ValueError, match=f"holdout fraction {fraction}: it holds out"):
        holdout(range(10), fraction, seed=0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 30])
def test_holdout_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        holdout(range(10), fraction, seed=0)


def test_rankings_of_fewer_answers_leave_places_empty():
    rows = [
        EncodedRanking([tokens(5, 6), tokens(7)], (1.0, 0.0)),
        EncodedRanking([tokens(1), tokens(2, 3, 4), tokens(8)], (2.0, 1.0, 1.0)),
    ]
    batch = pad_rankings(rows, width=3, num_answers=3, pad_id=9)
    assert batch.answers.tokens.tolist() == [
        [[5, 6, 9], [7, 9, 9], [9, 9, 9]],
        [[1, 9, 9], [2, 3, 4], [8, 9, 9]],
    ]
    assert batch.answers.mask.sum(axis=2).tolist() == [[2, 1, 0], [1, 3, 1]]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.grades.tolist() == [[1.0, 0.0, 0.0], [2.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match="num_answers=2: a row has 3"):
        pad_rankings(rows, width=3, num_answers=2, pad_id=9)

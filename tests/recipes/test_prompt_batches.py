"""Batches of prompts: tokens and columns stay together, whatever is taken."""

import numpy as np
import pytest

from rlhf_jax.data.text_data import PromptRow
from rlhf_jax.recipes.prompt_batches import PromptData, collate

WIDTH, PAD = 4, 99


def data_row(number):
    """Prompt number n is n tokens n, and n is its answer."""
    row = PromptRow(f"prompt {number}", {"answer": number, "double": 2 * number})
    return row, np.full(number, number, np.int32)


@pytest.fixture
def batch():
    return collate([data_row(n) for n in (3, 1, 2)], width=WIDTH, pad_id=PAD)


def assert_is(batch, numbers):
    """Of these prompts, in this order, in every one of its parts."""
    assert batch.texts == [f"prompt {n}" for n in numbers]
    assert batch.columns == {
        "answer": list(numbers),
        "double": [2 * n for n in numbers],
    }
    assert np.asarray(batch.prompts.lengths).tolist() == list(numbers)
    want = [[PAD] * (WIDTH - n) + [n] * n for n in numbers]
    assert np.asarray(batch.prompts.tokens).tolist() == want


def test_rows_and_left_padded_tokens(batch):
    assert_is(batch, [3, 1, 2])


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_take(batch, kind):
    assert_is(batch.take(kind([2, 0])), [2, 3])
    assert_is(batch.take(kind([1, 1, 0, 2])), [1, 1, 3, 2])
    assert_is(batch.take(range(0, 3, 2)), [3, 2])
    assert_is(batch, [3, 1, 2])


def test_repeat_keeps_the_copies_of_a_prompt_together(batch):
    assert_is(batch.repeat(3), [3, 3, 3, 1, 1, 1, 2, 2, 2])
    assert_is(batch.repeat(1), [3, 1, 2])


def test_join(batch):
    other = collate([data_row(4), data_row(1)], width=WIDTH, pad_id=PAD)
    assert_is(batch.join(other), [3, 1, 2, 4, 1])
    assert_is(other.join(batch), [4, 1, 3, 1, 2])


def test_groups_replaced_by_those_of_another_batch(batch):
    """Two answers each; the middle prompt gives way to the other batch's last."""
    other = collate([data_row(4), data_row(1)], width=WIDTH, pad_id=PAD).repeat(2)
    joined = batch.repeat(2).join(other)
    assert_is(joined.take([0, 1, 8, 9, 4, 5]), [3, 3, 1, 1, 2, 2])


def test_training_batches_by_number():
    rows = [data_row(n) for n in (1, 2, 3, 4)]
    data = PromptData(
        rows=rows,
        held_out=collate(rows[:1], width=WIDTH, pad_id=PAD),
        width=WIDTH,
        pad_id=PAD,
    )
    batches = data.batches(batch_size=2, seed=5)
    drawn = [batches[0].columns["answer"], batches[1].columns["answer"]]
    for numbers, batch in zip(drawn, (batches[0], batches[1]), strict=True):
        assert_is(batch, numbers)
    assert sorted(drawn[0] + drawn[1]) == [1, 2, 3, 4]  # an epoch, each prompt once
    assert batches[0].columns["answer"] == drawn[0]


def test_prompts_without_columns():
    rows = [(PromptRow("a", {}), np.array([1], np.int32))] * 2
    batch = collate(rows, width=2, pad_id=PAD)
    assert batch.columns == {}
    assert batch.repeat(2).texts == ["a"] * 4

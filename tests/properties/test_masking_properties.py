"""What no function over tokens may depend on: padding, width, order, empty rows."""

import chex
import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from properties.pure_functions import evaluate
from properties.strategies import (
    CHECK,
    GARBAGE,
    TOKEN_ARRAYS,
    TOLERANCE,
    B,
    T,
    batches,
    with_padding,
)


def assert_finite(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@given(batch=batches(), garbage=GARBAGE)
@CHECK
def test_padding_content_is_never_read(batch, garbage):
    want = evaluate(batch)
    assert_finite(want)
    chex.assert_trees_all_equal(evaluate(with_padding(batch, garbage)), want)


@given(batch=batches(), garbage=GARBAGE)
@CHECK
def test_results_are_zero_where_there_is_no_token(batch, garbage):
    for path, leaf in jax.tree.leaves_with_path(evaluate(with_padding(batch, garbage))):
        if leaf.shape == (B, T):
            name = jax.tree_util.keystr(path)
            np.testing.assert_array_equal(leaf[~batch["mask"]], 0, err_msg=name)


@given(batch=batches(), garbage=GARBAGE)
@CHECK
def test_pad_columns_change_nothing(batch, garbage):
    columns = ((0, 0), (0, 2))
    wide = batch | {"mask": np.pad(batch["mask"], columns)}
    for name in TOKEN_ARRAYS:
        wide[name] = np.pad(batch[name], columns, constant_values=np.float32(garbage))
    got = jax.tree.map(lambda x: x[:, :T] if x.ndim == 2 else x, evaluate(wide))
    chex.assert_trees_all_close(got, evaluate(batch), **TOLERANCE)


@given(batch=batches(), order=st.permutations(range(B)))
@CHECK
def test_the_order_of_the_batch_is_irrelevant(batch, order):
    order = np.array(order)
    turned = jax.tree.map(lambda x: x[order], batch)
    want = jax.tree.map(lambda x: x[order] if x.ndim else x, evaluate(batch))
    chex.assert_trees_all_close(evaluate(turned), want, **TOLERANCE)


@given(batch=batches(), row=st.integers(0, B - 1), garbage=GARBAGE)
@CHECK
def test_a_fully_masked_row_adds_nothing(batch, row, garbage):
    others = np.arange(B) != row
    masked = batch | {"mask": batch["mask"] & others[:, None]}
    without = jax.tree.map(lambda x: x[others], batch)
    got = evaluate(with_padding(masked, garbage))
    got = jax.tree.map(lambda x: x[others] if x.ndim else x, got)
    chex.assert_trees_all_close(got, evaluate(without), **TOLERANCE)


@given(batch=batches(), garbage=GARBAGE)
@CHECK
def test_a_batch_without_any_token_gives_zero(batch, garbage):
    empty = with_padding(batch | {"mask": np.zeros((B, T), bool)}, garbage)
    for path, leaf in jax.tree.leaves_with_path(evaluate(empty)):
        np.testing.assert_array_equal(leaf, 0, err_msg=jax.tree_util.keystr(path))


@given(batch=batches())
@CHECK
def test_inputs_are_not_modified(batch):
    # NumPy arrays, whose memory a program on a CPU may read in place.
    before = jax.tree.map(np.copy, batch)
    evaluate(batch)
    chex.assert_trees_all_equal(batch, before)

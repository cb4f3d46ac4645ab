"""Scores to rewards: sums, one position, missing stop tokens, long answers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.strategies import CHECK, TOLERANCE, B, T, arrays, batches, ragged_masks

from rlhf_jax.algo.masking import include_end_state, response_mask
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.scores import penalize_missing_eos, soft_overlong_penalty
from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.rollout.scoring import mark_stops

POSITIONS = ["last_token", "after_last_token"]
ESTIMATORS = ["k1", "k2", "k3", "abs"]
MODES = ["subtract", "replace", "scale"]
shape = {
    (position, estimator): jax.jit(
        partial(shape_rewards, score_position=position, estimator=estimator)
    )
    for position in POSITIONS
    for estimator in ESTIMATORS
}
penalize = {mode: jax.jit(partial(penalize_missing_eos, mode=mode)) for mode in MODES}
tokens = st.binary(min_size=B * T, max_size=B * T).map(
    lambda raw: (np.frombuffer(raw, np.uint8) % 7).astype(np.int32).reshape(B, T)
)
stop_ids = st.lists(st.integers(0, 6), max_size=2).map(tuple)


def shaped(batch, position, estimator="k1", kl_coef=0.25):
    names = ("scores", "logprobs", "ref_logprobs", "mask")
    results = shape[position, estimator](*(batch[n] for n in names), kl_coef=kl_coef)
    return [np.asarray(x) for x in results]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(batch=batches())
@CHECK
def test_a_row_adds_up_to_its_score_minus_the_kl(position, estimator, batch):
    rewards, kl = shaped(batch, position, estimator)
    scores = np.where(batch["mask"].any(axis=1), batch["scores"], 0)
    np.testing.assert_allclose(
        rewards.sum(axis=1), scores - 0.25 * kl.sum(axis=1), **TOLERANCE
    )
    np.testing.assert_array_equal(kl[~batch["mask"]], 0)


@pytest.mark.parametrize("position", POSITIONS)
@given(batch=batches())
@CHECK
def test_the_whole_score_sits_on_one_position(position, batch):
    rewards, kl = shaped(batch, position)
    for b, m in enumerate(batch["mask"]):
        place = np.flatnonzero(rewards[b] + np.float32(0.25) * kl[b])
        if not m.any():
            assert len(place) == 0
            continue
        end = np.flatnonzero(m)[-1]
        if position == "after_last_token":
            end = min(end + 1, T - 1)
        assert list(place) == [end]  # scores are fractions: an integer would round
        want = batch["scores"][b] - np.float32(0.25) * kl[b, end]
        np.testing.assert_allclose(rewards[b, end], want, **TOLERANCE)


@given(batch=batches(masks=ragged_masks(longest=T - 1)))
@CHECK
def test_pad_columns_behind_the_state_after_the_last_token(batch):
    # Of a row that is not full; a full one gets that state with the first pad column.
    rewards, _ = shaped(batch, "after_last_token")
    wide = {
        name: np.pad(batch[name], ((0, 0), (0, 2)))
        for name in ("logprobs", "ref_logprobs", "mask")
    }
    wider, _ = shaped(batch | wide, "after_last_token")
    np.testing.assert_array_equal(wider, np.pad(rewards, ((0, 0), (0, 2))))
    states = include_end_state(jnp.asarray(batch["mask"]))
    np.testing.assert_array_equal(rewards[~np.asarray(states)], 0)


# ---- stop tokens ----


@given(tokens=tokens, stops=stop_ids, garbage=tokens)
@CHECK
def test_the_mask_ends_with_the_first_stop_token(tokens, stops, garbage):
    mask = np.asarray(response_mask(jnp.asarray(tokens), stop_ids=stops))
    for row, m in zip(tokens, mask, strict=True):
        hits = [t for t, token in enumerate(row) if token in stops]
        length = hits[0] + 1 if hits else T
        assert list(m) == [True] * length + [False] * (T - length)
    # What follows the stop token, were it another one or a pad id, does not matter.
    dirty = np.where(mask, tokens, garbage)
    np.testing.assert_array_equal(
        response_mask(jnp.asarray(dirty), stop_ids=stops), mask
    )


@given(tokens=tokens, prompts=tokens, stops=stop_ids)
@CHECK
def test_a_missing_stop_is_seen_in_the_response_alone(tokens, prompts, stops):
    rollout = Rollout(
        prompts=Prompts(tokens=jnp.asarray(prompts), lengths=jnp.full(B, T)),
        responses=jnp.asarray(tokens),
        lengths=jnp.full(B, T),
        truncated=jnp.ones(B, bool),
        logprobs=jnp.zeros((B, T)),
    )
    marked, mask = mark_stops(rollout, stops)
    missing = [not set(row) & set(stops) for row in tokens.tolist()]
    np.testing.assert_array_equal(marked.truncated, missing)
    np.testing.assert_array_equal(
        mask, response_mask(rollout.responses, stop_ids=stops)
    )
    np.testing.assert_array_equal(marked.mask, np.ones((B, T), bool))


@given(batch=batches(), penalty=arrays(()))
@CHECK
def test_penalties_of_a_missing_stop(batch, penalty):
    scores, truncated = batch["scores"], batch["truncated"]
    want = {
        "subtract": scores - penalty,
        "replace": np.full(B, penalty),
        "scale": scores * penalty,
    }
    for mode in MODES:
        got = penalize[mode](scores, truncated, penalty=penalty)
        np.testing.assert_allclose(
            np.asarray(got)[truncated], want[mode][truncated], **TOLERANCE
        )
        # Finished answers keep every bit.
        np.testing.assert_array_equal(np.asarray(got)[~truncated], scores[~truncated])
    once = penalize["replace"](scores, truncated, penalty=penalty)
    twice = penalize["replace"](once, truncated, penalty=penalty)
    np.testing.assert_array_equal(once, twice)


# ---- long answers ----


@given(
    lengths=st.lists(st.integers(0, 200), min_size=B, max_size=B),
    limit=st.integers(1, 120),
    share=st.floats(0, 1),
)
@CHECK
def test_the_ramp_of_long_answers(lengths, limit, share):
    buffer = max(1, round(share * limit))
    got = soft_overlong_penalty(jnp.array(lengths), limit=limit, buffer=buffer)
    for length, penalty in zip(lengths, got, strict=True):
        if length > limit:
            want = -1.0
        else:
            want = min(-(length - (limit - buffer)) / buffer, 0.0)
        np.testing.assert_allclose(penalty, want, **TOLERANCE)

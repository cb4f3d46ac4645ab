"""What holds of the transcriptions on any batch: gradients, columns read, scale."""

import dataclasses
import math

import numpy as np
import pytest
from config import transcriptions
from config.transcription_parts import Batch, Numbers, random_batch

VALUE_COEF = {
    transcriptions.transcribe_openai_2019: 0.1,
    transcriptions.transcribe_nplus_tldr: 0.1,
    transcriptions.transcribe_trl: 0.1,
    transcriptions.transcribe_openrlhf: 1.0,
    transcriptions.transcribe_verl: 1.0,
    transcriptions.transcribe_deepspeed_chat: 1.0,
}
EACH = pytest.mark.parametrize("transcribe", VALUE_COEF)
ARRAYS = ["old_logprobs", "ref_logprobs", "old_values", "new_logprobs", "new_values"]


def flat(numbers: Numbers) -> np.ndarray:
    return np.concatenate([np.ravel(v) for v in dataclasses.astuple(numbers)])


def moved(batch: Batch, name: str, place: tuple[int, int], change: float) -> Batch:
    array = getattr(batch, name).copy()
    array[place] += change
    return dataclasses.replace(batch, **{name: array})


@EACH
def test_gradients_match_central_differences(transcribe):
    batch, h = random_batch(7), 1e-6
    numbers = transcribe(batch)

    def slope(name, place, loss):
        up, down = (
            getattr(transcribe(moved(batch, name, place, change)), loss)
            for change in (h, -h)
        )
        return (up - down) / (2 * h)

    for place in np.ndindex(batch.new_values.shape):
        np.testing.assert_allclose(
            [numbers.logprob_gradient[place], numbers.value_gradient[place]],
            [
                slope("new_logprobs", place, "policy_loss"),
                VALUE_COEF[transcribe] * slope("new_values", place, "value_loss"),
            ],
            rtol=1e-6,
            atol=1e-8,  # of rounding in a loss of order 1, divided by h
        )


def reads(transcribe, name, t, length):
    """Whether an implementation looks at column t of a row with this many tokens."""
    after_the_last_token = {
        transcriptions.transcribe_nplus_tldr: ["old_values", "new_values"],
        transcriptions.transcribe_trl: ["old_values", "new_values"],
        transcriptions.transcribe_deepspeed_chat: [
            "old_logprobs",
            "ref_logprobs",
            "old_values",
        ],
    }
    if transcribe is transcriptions.transcribe_openai_2019:
        return True
    if transcribe is transcriptions.transcribe_verl and name == "ref_logprobs":
        return False
    return t < length + (name in after_the_last_token.get(transcribe, []))


@EACH
@pytest.mark.parametrize("name", ARRAYS)
def test_reads_exactly_these_columns(transcribe, name):
    batch = random_batch(3)
    before = flat(transcribe(batch))
    for b, t in np.ndindex(batch.old_values.shape):
        if reads(transcribe, name, t, batch.lengths[b]):
            after = flat(transcribe(moved(batch, name, (b, t), math.nan)))
            assert np.isnan(after).any(), f"{name}[{b}, {t}] is never read"
            continue
        for garbage in (math.nan, math.inf, 1e4):
            after = flat(transcribe(moved(batch, name, (b, t), garbage)))
            np.testing.assert_array_equal(after, before)


@EACH
def test_an_unfinished_response(transcribe):
    batch = random_batch(1)
    assert batch.truncated.any() and not batch.truncated.all()
    finished = dataclasses.replace(batch, truncated=np.zeros(len(batch.scores), bool))
    if transcribe in (
        transcriptions.transcribe_openai_2019,
        transcriptions.transcribe_nplus_tldr,
    ):
        finished = dataclasses.replace(
            finished, scores=np.where(batch.truncated, -1.0, batch.scores)
        )
    np.testing.assert_array_equal(flat(transcribe(batch)), flat(transcribe(finished)))


@pytest.mark.parametrize(
    ("transcribe", "ddof"),
    [
        (transcriptions.transcribe_nplus_tldr, 0),
        (transcriptions.transcribe_trl, 1),
        (transcriptions.transcribe_openrlhf, 0),
        (transcriptions.transcribe_verl, 1),
    ],
)
def test_whitens_over_the_tokens_of_ragged_rows(transcribe, ddof):
    batch = random_batch(5)
    tokens = np.arange(7) < batch.lengths[:, None]
    advantages = transcribe(batch).advantages
    assert not advantages[~tokens].any()
    np.testing.assert_allclose(advantages[tokens].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(advantages[tokens].var(ddof=ddof), 1, rtol=1e-6)


MICROBATCHED = pytest.mark.parametrize(
    "transcribe", [transcriptions.transcribe_nplus_tldr, transcriptions.transcribe_trl]
)


@MICROBATCHED
def test_microbatches_change_the_weight_of_a_row(transcribe):
    """A quarter over one row's own tokens, in place of one over all tokens."""
    batch = random_batch(2, batch=4)
    whole, split = transcribe(batch), transcribe(batch, microbatches=4)
    tokens, states = batch.lengths, np.minimum(batch.lengths + 1, 7)
    for b in range(4):
        np.testing.assert_allclose(
            split.logprob_gradient[b] * 4 * tokens[b],
            whole.logprob_gradient[b] * tokens.sum(),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            split.value_gradient[b] * 4 * states[b],
            whole.value_gradient[b] * states.sum(),
            rtol=1e-12,
        )
    with pytest.raises(ValueError, match="microbatches=3 does not divide 4 rows"):
        transcribe(batch, microbatches=3)


@EACH
def test_random_batches_take_every_branch(transcribe):
    """Policy: both signs of A with each range of ρ. Value: clipped and free."""
    ratios, states = set(), set()
    for seed in range(3):
        batch = random_batch(seed)
        numbers = transcribe(batch)
        ratio = np.exp(batch.new_logprobs - batch.old_logprobs)
        step = batch.new_values - batch.old_values
        for place in zip(*np.nonzero(numbers.advantages), strict=True):
            band = int(np.digitize(ratio[place], [0.8, 1.2, 3.0]))
            ratios.add((numbers.advantages[place] > 0, band))
        for b, t in np.argwhere(numbers.returns):
            band = int(np.digitize(abs(step[b, t]), [0.2, 0.5]))
            states.add((band, bool(numbers.value_gradient[b, t])))
    assert ratios == {(sign, band) for sign in (False, True) for band in range(4)}
    beyond_half = {(2, False), (2, True)}
    if VALUE_COEF[transcribe] == 1.0 and transcribe is not (
        transcriptions.transcribe_deepspeed_chat
    ):
        assert states == {(0, True), (1, True)} | beyond_half  # clipped at .5
    else:
        assert states == {(0, True), (1, False), (1, True)} | beyond_half

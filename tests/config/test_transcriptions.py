"""The transcriptions against numbers worked out by hand."""

import dataclasses
import math

import numpy as np
import pytest
from config import transcriptions
from config.transcription_parts import Batch, random_batch


def batch_of(**fields) -> Batch:
    """One unless told otherwise: full rows, no KL, nothing moved, values 0."""
    scores = np.asarray(fields.pop("scores"), float)
    width = fields.pop("width")
    shape = (len(scores), width)
    defaults = {
        "scores": scores,
        "lengths": np.full(len(scores), width),
        "truncated": np.zeros(len(scores), bool),
        "old_logprobs": np.full(shape, -1.0),
        "old_values": np.zeros(shape),
        "kl_coef": 0.1,
    }
    given = {
        name: value if name == "kl_coef" else np.asarray(value)
        for name, value in fields.items()
    }
    known = defaults | given
    known.setdefault("ref_logprobs", known["old_logprobs"])
    known.setdefault("new_logprobs", known["old_logprobs"])
    known.setdefault("new_values", known["old_values"])
    return Batch(**known)


# Deviations of 1.2, 1.3, ..., 2.0 over √(variance + 1e-8), variance .0667 and .075
WHITENED = {
    0: [
        [-1.54919322229348, -1.1618949167201098, -0.7745966111467405],
        [-0.38729830557337025, 0, 0.38729830557336936],
        [0.7745966111467396, 1.161894916720109, 1.5491932222934792],
    ],
    1: [
        [-1.4605933893075542, -1.0954450419806654, -0.7302966946537776],
        [-0.3651483473268888, 0, 0.36514834732688795],
        [0.7302966946537767, 1.0954450419806647, 1.4605933893075533],
    ],
}
TO_WHITEN = np.array([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_where_the_score_sits_shows_in_the_returns():
    """Three tokens in five columns, score 1, no KL; λ = 1 in OpenRLHF and verl."""
    row = {"scores": [1.0], "width": 5, "lengths": [3]}
    values = [[0.1, 0.2, 0.3, 0.7, 99.0]]

    def returns(transcribe, old_values):
        batch = batch_of(**row, old_values=old_values)
        return transcribe(batch).returns[0]

    for transcribe in (
        transcriptions.transcribe_openrlhf,
        transcriptions.transcribe_verl,
    ):
        np.testing.assert_allclose(returns(transcribe, values), [1, 1, 1, 0, 0])
    for transcribe in (
        transcriptions.transcribe_nplus_tldr,
        transcriptions.transcribe_trl,
    ):
        np.testing.assert_allclose(
            returns(transcribe, values), [0.9132125, 0.95075, 0.985, 1, 0], rtol=1e-14
        )
    np.testing.assert_allclose(
        returns(transcriptions.transcribe_deepspeed_chat, values),
        [0.9132125, 0.95075, 0.985, 0, 0],
        rtol=1e-14,
    )


@pytest.mark.parametrize(
    ("transcribe", "lam", "ddof"),
    [
        (transcriptions.transcribe_nplus_tldr, 0.95, 0),
        (transcriptions.transcribe_trl, 0.95, 1),
        (transcriptions.transcribe_openrlhf, 1.0, 0),
    ],
)
def test_whitened_advantages_from_rewards_of_kl_alone(transcribe, lam, ddof):
    """Values and scores 0, so A_t = r_t + λ·A_{t+1}: rewards for A = 1.2 ... 2."""
    rewards = TO_WHITEN - lam * np.pad(TO_WHITEN[:, 1:], ((0, 0), (0, 1)))
    batch = batch_of(
        scores=[0, 0, 0], width=3, ref_logprobs=-1.0 + rewards / 0.5, kl_coef=0.5
    )
    numbers = transcribe(batch)
    np.testing.assert_allclose(numbers.rewards, rewards, rtol=1e-12)
    np.testing.assert_allclose(numbers.returns, TO_WHITEN, rtol=1e-12)
    np.testing.assert_allclose(  # 1e-6: OpenRLHF does not add the 1e-8 to .0667
        numbers.advantages, WHITENED[ddof], rtol=1e-6, atol=1e-12
    )


def test_verl_whitens_with_one_degree_of_freedom_less():
    """Score 0 and λ = 1, so A = −V, whatever the KL."""
    numbers = transcriptions.transcribe_verl(
        batch_of(scores=[0, 0, 0], width=3, old_values=-TO_WHITEN)
    )
    np.testing.assert_allclose(numbers.advantages, WHITENED[1], atol=1e-12)


# Two rows of one token with scores 1 and −1, values 0: A is 1 and −1 before whitening,
# of variance 1 with ddof 0 and 2 with ddof 1.
HALF, DEEP = math.log(0.5), math.exp(-20.0)


@pytest.mark.parametrize(
    ("transcribe", "log_ratios", "losses", "slopes"),
    [
        (transcriptions.transcribe_openrlhf, (HALF, 1.5), (-0.5, 4.48168907), None),
        (transcriptions.transcribe_openrlhf, (-25, 25), (-DEEP, 1 / DEEP), (0, 0)),
        (transcriptions.transcribe_verl, (HALF, 0.9), (-0.5, 2.45960311), None),
        (transcriptions.transcribe_verl, (HALF, 1.5), (-0.5, 3), (-0.5, 0)),
        (transcriptions.transcribe_verl, (-25, 25), (-DEEP, 3), (0, 0)),
        (
            transcriptions.transcribe_deepspeed_chat,
            (HALF, 1.5),
            (-0.5, 4.48168907),
            None,
        ),
        (
            transcriptions.transcribe_deepspeed_chat,
            (-25, 25),
            (-math.exp(-25), math.exp(25)),
            None,
        ),
    ],
)
def test_which_ratios_are_clamped(transcribe, log_ratios, losses, slopes):
    """Slopes are the losses where nothing holds them: −A·ρ is its own derivative."""
    batch = batch_of(
        scores=[1.0, -1.0], width=1, new_logprobs=-1.0 + np.array(log_ratios)[:, None]
    )
    size = 2**-0.5 if transcribe is transcriptions.transcribe_verl else 1.0
    numbers = transcribe(batch)
    close = {"rtol": 3e-8}  # the 1e-8 beside a variance of 1, and nine digits above
    np.testing.assert_allclose(numbers.policy_loss, size * sum(losses) / 2, **close)
    np.testing.assert_allclose(
        numbers.logprob_gradient[:, 0],
        size * np.array(slopes or losses) / 2,
        **close,
    )


def test_openrlhf_pays_nothing_at_a_negative_kl_coefficient():
    batch = dataclasses.replace(random_batch(4), kl_coef=-0.1)
    numbers = transcriptions.transcribe_openrlhf(batch)
    clamped = np.clip(batch.scores, -10, 10)
    np.testing.assert_array_equal(numbers.rewards.sum(axis=1), clamped)


def test_deepspeed_chat_clamps_the_score_only():
    """A KL of 12 in full, at β = 1; scores of 6 and −6 as ±5."""
    batch = batch_of(
        scores=[6.0, -6.0], width=2, ref_logprobs=[[-13, -1], [-1, -1]], kl_coef=1.0
    )
    rewards = transcriptions.transcribe_deepspeed_chat(batch).rewards
    np.testing.assert_allclose(rewards, [[-12, 5], [0, -5]])


def test_openrlhf_clamps_kl_and_score():
    """KL of 12, −11 and 3 counts as 10, −10 and 3; scores of 12 and −15 as ±10."""
    numbers = transcriptions.transcribe_openrlhf(
        batch_of(
            scores=[12.0, -15.0],
            width=3,
            ref_logprobs=[[-13.0, 10.0, -4.0], [-1.0, -1.0, -1.0]],
            kl_coef=0.01,
        )
    )
    np.testing.assert_allclose(
        numbers.rewards, [[-0.1, 0.1, 10 - 0.03], [0, 0, -10]], rtol=1e-12
    )


def test_openai_2019_by_hand():
    """One row of two columns: whitening two numbers gives −1 and 1."""
    numbers = transcriptions.transcribe_openai_2019(
        batch_of(
            scores=[0.7],
            width=2,
            lengths=[1],  # the score goes on the last column all the same
            old_logprobs=[[-1.0, -2.0]],
            ref_logprobs=[[-1.5, -1.8]],  # KL .5 and −.2
            old_values=[[0.3, 0.4]],
            new_logprobs=[[-1.0 + math.log(1.5), -2.0 + math.log(0.5)]],
            new_values=[[0.8, 1.0]],
            kl_coef=0.5,
        )
    )
    # Rewards −.25 and .1 + .7, of mean .275; then δ = −.725 + .4 − .3, 1.275 − .4.
    close = {"rtol": 1e-6}  # the 1e-8 beside a variance of .28
    np.testing.assert_allclose(numbers.rewards, [[-0.725, 1.275]], **close)
    np.testing.assert_allclose(numbers.returns, [[0.50625, 1.275]], **close)
    np.testing.assert_allclose(numbers.advantages, [[-1.0, 1.0]], **close)
    # −(−1)·1.5 is larger than at 1.2, and −.5 is larger than −.8: nothing is clipped.
    np.testing.assert_allclose(numbers.policy_loss, (1.5 - 0.5) / 2, **close)
    np.testing.assert_allclose(numbers.logprob_gradient, [[0.75, -0.25]], **close)
    # (.8 − .50625)² and, held at .4 + .2, (.6 − 1.275)²
    np.testing.assert_allclose(
        numbers.value_loss, 0.5 * (0.0862890625 + 0.455625) / 2, **close
    )
    np.testing.assert_allclose(numbers.value_gradient, [[0.0146875, 0.0]], **close)
    assert numbers.next_kl_coef == pytest.approx(0.5 * (1 - 0.2 / 10000), rel=1e-12)


def test_openai_2019_counts_the_kl_of_a_whole_sequence():
    """512 episodes of KL 2·6 at target 6: β grows by .2·512/10000."""
    numbers = transcriptions.transcribe_openai_2019(
        batch_of(
            scores=np.arange(512) % 3 - 0.9,
            width=2,
            ref_logprobs=np.full((512, 2), -7.0),
            kl_coef=0.15,
        )
    )
    assert numbers.next_kl_coef == pytest.approx(0.151536, rel=1e-12)


def test_deepspeed_chat_by_hand():
    """Two tokens, and the pad token that gets the score together with its own KL."""
    numbers = transcriptions.transcribe_deepspeed_chat(
        batch_of(
            scores=[7.5],
            width=4,
            lengths=[2],
            old_logprobs=[[-1.0, -2.0, -3.0, -9.0]],
            ref_logprobs=[[-1.5, -1.8, -2.0, -4.0]],  # KL .5, −.2 and −1
            old_values=[[0.3, 0.4, 0.6, 77.0]],
            new_logprobs=[[-1.0 + math.log(1.1), -2.0 + math.log(1.5), -5.0, -5.0]],
            new_values=[[0.4, 0.9, 3.0, 3.0]],
            kl_coef=0.1,
        )
    )
    close = {"rtol": 1e-12, "atol": 1e-15}
    np.testing.assert_allclose(numbers.rewards, [[-0.05, 0.02, 5.1, 0.0]], **close)
    # δ = .05, .22 and 4.5
    np.testing.assert_allclose(numbers.advantages, [[4.32025, 4.495, 0, 0]], **close)
    np.testing.assert_allclose(numbers.returns, [[4.62025, 4.895, 0, 0]], **close)
    np.testing.assert_allclose(
        numbers.policy_loss, -(4.32025 * 1.1 + 4.495 * 1.2) / 2, **close
    )
    np.testing.assert_allclose(
        numbers.logprob_gradient, [[-4.32025 * 1.1 / 2, 0, 0, 0]], **close
    )
    np.testing.assert_allclose(  # (.4 − 4.62025)² and, held at .6, (.6 − 4.895)²
        numbers.value_loss, 0.5 * (17.8105100625 + 18.447025) / 2, **close
    )
    np.testing.assert_allclose(numbers.value_gradient, [[-2.110125, 0, 0, 0]], **close)
    assert numbers.next_kl_coef == 0.1


MICROBATCHED = pytest.mark.parametrize(
    "transcribe", [transcriptions.transcribe_nplus_tldr, transcriptions.transcribe_trl]
)


@MICROBATCHED
def test_microbatches_take_the_mean_of_means(transcribe):
    """Squared errors 1, 2 and 3, ..., 7: the mean is 4, the mean of means 3.25."""
    squares = [[1, 2, 8, 9, 9], [3, 4, 5, 6, 7]]
    batch = batch_of(
        scores=[0, 0], width=5, lengths=[1, 4], new_values=np.sqrt(squares)
    )
    assert transcribe(batch).value_loss == pytest.approx(0.5 * 4.0, rel=1e-12)
    assert transcribe(batch, 2).value_loss == pytest.approx(0.5 * 3.25, rel=1e-12)

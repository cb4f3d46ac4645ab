"""Written reviews are sound, spoiled ones are not."""

import collections

import numpy as np
import pytest

from rlhf_jax.tasks.review_reward import Fault, appraise
from rlhf_jax.tasks.review_spoiler import spoil
from rlhf_jax.tasks.review_words import ASPECTS, KINDS, OPINIONS
from rlhf_jax.tasks.review_writer import write_review


def prompt_of(kind):
    return f"Review of the {kind} The Silent Harbour:"


@pytest.mark.parametrize("kind", KINDS)
def test_written_reviews_have_no_fault(kind):
    rng = np.random.default_rng(0)
    for _ in range(400):
        review = write_review(rng, kind)
        appraisal = appraise(prompt_of(kind), review)
        assert appraisal.faults == (), review
        assert review.startswith(" ") and review.count(".") in (2, 3)
        assert appraisal.judgements[-1][0] == "verdict"


def test_mood_sets_the_reward():
    rng = np.random.default_rng(1)

    def mean_reward(mood):
        reviews = [write_review(rng, "album", mood=mood) for _ in range(300)]
        return np.mean([appraise(prompt_of("album"), r).reward for r in reviews])

    # Phrases are near the mood, not at it; 300 reviews put the mean within 0.1.
    for mood in (-2.0, 0.0, 2.0):
        assert abs(mean_reward(mood) - mood) < 0.3


def test_every_opinion_and_aspect_is_written():
    rng = np.random.default_rng(2)
    text = " ".join(write_review(rng, kind) for kind in KINDS for _ in range(800))
    words = set(text.replace(".", "").replace(",", "").split())
    assert set(OPINIONS) | set(ASPECTS) <= words


def test_spoiled_reviews_show_every_fault_and_lose_reward():
    rng = np.random.default_rng(3)
    seen = collections.Counter()
    lost = []
    for _ in range(700):
        for kind in KINDS:
            review = write_review(rng, kind)
            spoiled = spoil(rng, kind, review)
            assert spoiled.startswith(" ")
            after = appraise(prompt_of(kind), spoiled)
            seen.update({fault for fault, _ in after.faults})
            lost.append(appraise(prompt_of(kind), review).reward - after.reward)
    assert min(seen[fault] for fault in Fault) >= 5, seen
    assert np.mean(lost) > 1.5
    assert np.mean(np.array(lost) > 0) > 0.85


def test_writer_and_spoiler_follow_their_generator():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [spoil(rng, "album", write_review(rng, "album")) for _ in range(20)]

    assert draw(4) == draw(4)
    assert draw(4) != draw(5)

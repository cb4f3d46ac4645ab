"""Prompts, demonstrations and simulated preferences."""

import collections
import itertools
import re

import numpy as np
import pytest

from rlhf_jax.tasks.review_reward import appraise
from rlhf_jax.tasks.reviews import (
    ANNOTATOR_TEMPERATURE,
    Preference,
    bayes_accuracy,
    label_pairs,
    make_demonstrations,
    make_preferences,
    make_prompts,
    true_reward,
    true_rewards,
)

FILM = "Review of the film The Silent Harbour:"


def faults(prompt, response):
    return bool(appraise(prompt, response).faults)


def name_of(prompt):
    return re.fullmatch(r".* (The \w+ \w+):", prompt)[1]


def test_prompts_differ_and_splits_share_no_name():
    train = make_prompts(0, 6400, "train")
    heldout = make_prompts(0, 1600, "heldout")
    assert len(set(train)) == 6400 and len(set(heldout)) == 1600
    names, new_names = set(map(name_of, train)), set(map(name_of, heldout))
    assert len(names) == 320 and len(new_names) == 80
    assert not names & new_names
    # Each word of a held-out name was seen in training.
    assert {w for n in new_names for w in n.split()} <= {
        w for n in names for w in n.split()
    }


def test_prompts_repeat_only_when_the_split_is_used_up():
    prompts = make_prompts(1, 1605, "heldout")
    assert len(prompts) == 1605 and len(set(prompts)) == 1600
    assert make_prompts(1, 0) == []


def test_demonstrations_are_balanced_and_spread():
    rows = make_demonstrations(2, 2000)
    rewards = true_rewards([r.prompt for r in rows], [r.response for r in rows])
    assert abs(rewards.mean()) < 0.15  # 3.5 standard errors of a spread of 1.9
    assert 1.5 < rewards.std() < 2.2
    words = set(re.findall(r"\w+", " ".join(r.prompt + r.response for r in rows)))
    assert 200 <= len(words) <= 400


def test_heaps_of_praise_score_below_an_average_review():
    rows = make_demonstrations(3, 300)
    average = true_rewards([r.prompt for r in rows], [r.response for r in rows]).mean()
    praise = ("superb", "brilliant", "wonderful", "excellent", "perfect")
    for repeat, joint, end in itertools.product((1, 3), (" ", ", ", ". "), ("", ".")):
        for words in (praise * repeat, praise[:1] * 5 * repeat):
            assert true_reward(FILM, f" {joint.join(words)}{end}") < average - 2


def test_everything_follows_its_seed():
    for make in (make_prompts, make_demonstrations, make_preferences):
        assert make(4, 30) == make(4, 30)
        assert make(4, 30) != make(5, 30)
        assert make(4, 30, "heldout") != make(4, 30, "train")
        rng = np.random.default_rng(4)
        assert make(rng, 30) == make(4, 30)
        assert make(rng, 30) != make(4, 30)  # a generator moves on


def test_annotator_follows_bradley_terry():
    better = " The plot was superb. I loved it."  # 3
    worse = " The plot was good. I enjoyed it."  # 2
    n = 20_000
    rows = label_pairs(
        6, [FILM] * n, [better] * n, [worse] * n, temperature=1 / np.log(3)
    )
    wins = np.array([row.chosen == better for row in rows])
    # Odds 3 to 1; the standard error is √(0.75·0.25/20,000) = 0.003.
    assert abs(wins.mean() - 0.75) < 0.0125
    for row, won in zip(rows[:100], wins[:100], strict=True):
        assert {row.chosen, row.rejected} == {better, worse}
        np.testing.assert_allclose(row.probability, 0.75 if won else 0.25)


def test_order_of_a_pair_does_not_matter_to_the_annotator():
    rows = make_preferences(7, 400)
    chosen_first = [r.chosen for r in rows]
    swapped = label_pairs(
        8, [r.prompt for r in rows], [r.rejected for r in rows], chosen_first
    )
    probability = {(r.prompt, r.chosen, r.rejected): r.probability for r in rows}
    for row in swapped:
        pair = (row.prompt, row.chosen, row.rejected)
        expected = probability.get(pair)
        if expected is None:
            expected = 1 - probability[row.prompt, row.rejected, row.chosen]
        np.testing.assert_allclose(row.probability, expected, atol=1e-12)


def test_bayes_accuracy_is_what_the_best_scorer_reaches():
    rows = [Preference(FILM, "a", "b", p) for p in (0.9, 0.2, 0.5)]
    np.testing.assert_allclose(bayes_accuracy(rows), (0.9 + 0.8 + 0.5) / 3)

    # The best answer sheet of all 2^4, each graded by the expected share it gets right.
    probabilities = (0.7, 0.35, 0.05, 0.55)
    best = max(
        np.mean(np.where(sheet, probabilities, np.subtract(1, probabilities)))
        for sheet in itertools.product((True, False), repeat=4)
    )
    rows = [Preference(FILM, "a", "b", p) for p in probabilities]
    np.testing.assert_allclose(bayes_accuracy(rows), best)


def test_true_reward_reaches_bayes_accuracy_on_drawn_labels():
    rows = make_preferences(9, 4000)
    prompts = [r.prompt for r in rows]
    margin = true_rewards(prompts, [r.chosen for r in rows]) - true_rewards(
        prompts, [r.rejected for r in rows]
    )
    reached = np.mean(np.where(margin == 0, 0.5, margin > 0))
    assert 0.85 < bayes_accuracy(rows) < 0.92
    # The standard error is below √(0.88·0.12/4000) = 0.005.
    assert abs(reached - bayes_accuracy(rows)) < 0.02


def test_pairs_hold_different_responses_and_malformed_text():
    rows = make_preferences(10, 1000, "heldout")
    assert all(r.chosen != r.rejected for r in rows)
    assert {r.prompt for r in rows} <= set(make_prompts(0, 1600, "heldout"))
    # Pairs of two sound responses, of one, and of none.
    faulty = collections.Counter(
        (faults(r.prompt, r.chosen), faults(r.prompt, r.rejected)) for r in rows
    )
    assert 700 < faulty[False, False] < 850  # 0.9 · 0.92² = 76 %, and harmless damage
    assert faulty[True, True] > 0  # 0.9 · 0.08² = 0.6 %
    assert 120 < faulty[False, True] > 3 * faulty[True, False] > 0


def test_lower_temperature_means_less_noise():
    noisy = make_preferences(11, 500, temperature=4 * ANNOTATOR_TEMPERATURE)
    sure = make_preferences(11, 500, temperature=ANNOTATOR_TEMPERATURE / 4)
    assert bayes_accuracy(noisy) < 0.75 < 0.95 < bayes_accuracy(sure)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="split='test' is unknown"):
        make_prompts(0, 1, "test")
    with pytest.raises(ValueError, match="n=-1"):
        make_prompts(0, -1)
    with pytest.raises(ValueError, match="temperature=0"):
        label_pairs(0, [FILM], ["a"], ["b"], temperature=0)
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        label_pairs(0, [FILM], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="at least one pair"):
        bayes_accuracy([])

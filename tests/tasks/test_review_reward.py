"""The true reward, by hand."""

import numpy as np
import pytest

from rlhf_jax.tasks.review_grammar import parse_sentence
from rlhf_jax.tasks.review_reward import Fault, appraise
from rlhf_jax.tasks.review_words import OPINIONS
from rlhf_jax.tasks.reviews import explain_reward, true_reward, true_rewards

FILM = "Review of the film The Silent Harbour:"
RESTAURANT = "My view of the restaurant The Golden Anchor:"

SOUND = [
    # mean of superb 3, good 2, loved 3
    ("The plot was superb. The cast was good. I loved it.", 8 / 3),
    ("The plot was terrible. I hated it.", -3.0),
    # not bad: 1.25 - 2/4 = 0.75; decent 1
    ("The plot was not bad. Overall, a decent film.", (0.75 + 1) / 2),
    # never dull: 1.5 · (1.25 - 2/4) = 1.125; enjoyed 2
    ("The jokes were never dull. I enjoyed it.", (1.125 + 2) / 2),
    # not very good: -(1.25 - 2.4/4) = -0.65; did not like: -(1.25 - 1/4) = -1
    ("I found the plot not very good. I did not like it.", (-0.65 - 1) / 2),
    # very good 2·1.2, slightly bad -2·0.5, would perhaps 1
    (
        "The music was very good, but the camera was slightly bad. "
        "I would perhaps recommend it.",
        (2.4 - 1.0 + 1.0) / 3,
    ),
    # the best there is: 3·1.3 twice
    ("The plot was absolutely superb. I absolutely loved it.", 3.9),
    ("The ending felt average. In short, it was an ordinary film.", 0.0),
    ("To me, the effects were flawed. I would never watch it again.", (-1 - 3) / 2),
]

FAULTY = [
    # nothing: two sentences missing 2·1.25, no verdict 0.75
    ("", -3.25, [Fault.TOO_SHORT] * 2 + [Fault.NO_VERDICT]),
    # the same, and unfinished 1.5
    (
        "superb superb superb",
        -4.75,
        [Fault.UNFINISHED] + [Fault.TOO_SHORT] * 2 + [Fault.NO_VERDICT],
    ),
    # 4·1.5 + 0.75 is more than the floor
    (
        "Superb. Superb. Superb. Superb.",
        -5.0,
        [Fault.UNREADABLE] * 4 + [Fault.NO_VERDICT],
    ),
    # (3 + 0) / 2 - 1.5 - 1.25 - 0.75
    (
        "The plot was superb. I would",
        -2.0,
        [Fault.UNFINISHED, Fault.TOO_SHORT, Fault.NO_VERDICT],
    ),
    # (3 + 0 + 3) / 3 - 1.5
    (
        "The plot was superb. Plot was brilliant the. I loved it.",
        0.5,
        [Fault.UNREADABLE],
    ),
    # films have no soup: (0 + 3) / 2 - 1.25
    ("The soup was superb. I loved it.", 0.25, [Fault.FOREIGN]),
    ("The plot was good. Overall, a superb restaurant.", -0.25, [Fault.FOREIGN]),
    ("The plot was superb. I would gladly eat there again.", 0.25, [Fault.FOREIGN]),
    # (2 + 0 + 2) / 3 - 1 - 0.5
    (
        "The plot was good. The plot was good. I enjoyed it.",
        4 / 3 - 1.5,
        [Fault.REPEATED_SUBJECT, Fault.REPEATED_WORD],
    ),
    # two verdicts: (3 + 3 + 0) / 3 - 1
    ("The plot was superb. I loved it. I enjoyed it.", 1.0, [Fault.REPEATED_SUBJECT]),
    # the same word: 3 - 0.5
    ("The plot was superb. Overall, a superb film.", 2.5, [Fault.REPEATED_WORD]),
    # actors are not food: 3 - 0.5
    ("The actors were delicious. I loved it.", 2.5, [Fault.MISFIT]),
    # was for were: (2 + 3) / 2 - 0.3
    ("The actors was good. I loved it.", 2.2, [Fault.SLIP]),
    ("The actors were good. Overall, a outstanding film.", 2.2, [Fault.SLIP]),
    ("the actors were good. I loved it.", 2.2, [Fault.SLIP]),
    (
        "The actors were good and the plot was bad. I liked it.",
        1 / 3 - 0.3,
        [Fault.SLIP],
    ),
    ("The actors were good, but the plot was lovely. I enjoyed it.", 1.7, [Fault.SLIP]),
    # very superb is worth 3·1.2, and no English
    ("The actors were very superb. I loved it.", 3.3 - 0.3, [Fault.SLIP]),
    # 2.5 - 0.75
    ("The plot was superb. The cast was good.", 1.75, [Fault.NO_VERDICT]),
    ("I loved it. The plot was superb.", 2.5, [Fault.VERDICT_NOT_LAST]),
    # 3 - 1.25
    ("I loved it.", 1.75, [Fault.TOO_SHORT]),
    # (-3 - 3 + 3) / 3 - 0.75
    (
        "The plot was awful. The cast was dreadful. I loved it.",
        -1.75,
        [Fault.CONTRADICTION],
    ),
    # (3 + 4·2) / 5 - 0.5
    (
        "The plot was superb. The cast was good. The music was lovely. "
        "The ending was great. I enjoyed it.",
        1.7,
        [Fault.TOO_LONG],
    ),
]


@pytest.mark.parametrize(("response", "expected"), SOUND)
def test_sound_review_is_worth_its_mean_judgement(response, expected):
    assert appraise(FILM, response).faults == ()
    np.testing.assert_allclose(true_reward(FILM, response), expected, atol=1e-12)


@pytest.mark.parametrize(("response", "expected", "faults"), FAULTY)
def test_faults_cost_what_they_should(response, expected, faults):
    assert [fault for fault, _ in appraise(FILM, response).faults] == faults
    np.testing.assert_allclose(true_reward(FILM, response), expected, atol=1e-12)


def test_every_fault_is_covered_here():
    assert {fault for _, _, faults in FAULTY for fault in faults} == set(Fault)


def test_reward_depends_on_the_kind_in_the_prompt():
    room = "The room was spotless. I would gladly eat there again."
    np.testing.assert_allclose(true_reward(RESTAURANT, room), 2.75)  # (3 + 2.5) / 2
    assert true_reward(FILM, room) == -2.5  # two foreign subjects, nothing else


def test_white_space_around_the_review_does_not_matter():
    review = "The plot was superb. I loved it."
    assert true_reward(FILM, f" {review}\n") == true_reward(f"{FILM} ", review) == 3.0


def test_reward_rises_with_the_grade():
    rewards = [
        true_reward(FILM, f"The plot was {opinion}. I would perhaps recommend it.")
        for opinion in (
            "absolutely terrible",
            "terrible",
            "very bad",
            "bad",
            "mediocre",
            "average",
            "decent",
            "good",
            "very good",
            "superb",
            "absolutely superb",
        )
    ]
    assert rewards == sorted(set(rewards))


@pytest.mark.parametrize("denial", ["not", "never", "not very", "never really"])
def test_denial_turns_every_opinion_and_leaves_less(denial):
    for word, opinion in OPINIONS.items():
        plain = parse_sentence(f"The plot was {word}")
        denied = parse_sentence(f"The plot was {denial} {word}")
        assert plain is not None and denied is not None
        before, after = plain.claims[0].value, denied.claims[0].value
        assert before == opinion.grade
        assert np.sign(after) == -np.sign(before)
        assert abs(after) <= 1.5 * abs(before)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "superb",
        "The plot",
        "The plot was",
        "The plot superb",
        "The plot was superb superb",
        "The plot was superb and",
        "The plot was superb and brilliant",
        "The plot was the plot was superb",
        "A superb film",  # no verb, and no closing lead-in
        "Overall a superb film",
        "Overall, overall, a superb film",
        "Frankly, a superb film",  # nor is this a closing one
        "Overall, superb film",
        "I would eat again",
        "I never loved it",
        "The plot was superb!",
        "The weather was superb",
        "The plot was absolutely very superb",
        "The plot was superb and I loved it",
    ],
)
def test_what_is_no_sentence_does_not_parse(text):
    assert parse_sentence(text) is None


def test_list_form_equals_single_calls():
    responses = [response for response, _, _ in FAULTY]
    rewards = true_rewards([FILM] * len(responses), responses)
    assert rewards.dtype == np.float64
    expected = [reward for _, reward, _ in FAULTY]
    np.testing.assert_allclose(rewards, expected, atol=1e-12)
    assert true_rewards([], []).shape == (0,)


def test_explanation_shows_every_part():
    text = explain_reward(FILM, " The plot was superb. The actors was good.")
    assert text.splitlines() == [
        "'The plot was superb. The actors was good.'",
        "   +3.00  plot",
        "   +2.00  actors",
        "=  +2.50  mean",
        "-   0.30  small mistake: actors was",
        "-   0.75  no verdict",
        "=  +1.45  true reward",
    ]


def test_errors_name_the_mistake():
    with pytest.raises(ValueError, match="'Review of a film:' is not a review prompt"):
        true_reward("Review of a film:", "I loved it.")
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        true_rewards([FILM, FILM], ["I loved it."])

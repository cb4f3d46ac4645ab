"""A language written down whole: by hand, and by the identities of its optimum."""

import math

import numpy as np
import pytest

from rlhf_jax.tasks import enumerable
from rlhf_jax.tasks.enumerable import EnumerableTask, random_task

BETA = 0.5


@pytest.fixture(scope="module")
def coin():
    """Two tokens, two steps: the responses are 0 · 10 · 11, with a fair reference.

    Scores are log 2, log 4, log 8, so that at β = 1 exp(r) is 2, 4, 8.
    """
    return EnumerableTask(
        vocabulary_size=2,
        max_steps=2,
        stop_token=0,
        ref_logits=np.zeros((2, 2)),
        scores=np.log([2.0, 4.0, 8.0]),
    )


# Stop token first, last and in between; one step; two tokens only.
TASKS = [
    random_task(0),
    random_task(1, vocabulary_size=3, max_steps=3, stop_token=1),
    random_task(2, vocabulary_size=5, max_steps=3, stop_token=4),
    random_task(3, vocabulary_size=3, max_steps=1),
    random_task(4, vocabulary_size=2, max_steps=4, stop_token=1),
]


@pytest.fixture(params=TASKS, ids=lambda t: f"V{t.vocabulary_size}T{t.max_steps}")
def task(request):
    return request.param


def random_policies(task, count, *, scale=1.0):
    rng = np.random.default_rng(7)
    return scale * rng.standard_normal((count, *task.ref_logits.shape))


def test_coin_enumerates_by_hand(coin):
    responses = coin.responses
    assert coin.prefixes == ((), (1,))
    # Two stop: 0 and 10. One is cut off: 11. Past the end tokens and states are 0.
    np.testing.assert_array_equal(responses.tokens, [[0, 0], [1, 0], [1, 1]])
    np.testing.assert_array_equal(responses.lengths, [1, 2, 2])
    np.testing.assert_array_equal(responses.truncated, [False, False, True])
    np.testing.assert_array_equal(responses.states, [[0, 0], [0, 1], [0, 1]])
    np.testing.assert_array_equal(
        responses.mask, [[True, False], [True, True], [True, True]]
    )
    # From (): 0 ends, 1 leads to (1,). From (1,): both end. The end stays the end.
    np.testing.assert_array_equal(coin.transitions, [[2, 1], [2, 2], [2, 2]])


def test_coin_optimum_by_hand(coin):
    # Z = ½·2 + ¼·4 + ¼·8 = 4, so π* = 1/4, 1/4, 1/2: 1/4 to stop at once, and
    # (1/4) / (3/4) = 1/3 to stop after that.
    assert enumerable.optimal_objective(coin, kl_coef=1.0) == pytest.approx(math.log(4))
    np.testing.assert_allclose(
        np.exp(enumerable.optimal_response_logprobs(coin, kl_coef=1.0)),
        [1 / 4, 1 / 4, 1 / 2],
    )
    np.testing.assert_allclose(
        np.exp(enumerable.optimal_policy(coin, kl_coef=1.0)),
        [[1 / 4, 3 / 4], [1 / 3, 2 / 3]],
    )


def test_coin_reference_by_hand(coin):
    # In units of log 2 the scores are 1, 2, 3. V(1,) = (2 + 3) / 2 = 2.5 and
    # V() = (1 + 2.5) / 2 = 1.75. d = 1, ½ and π = ½, so the gradient is
    # ½·(1 − 1.75), ½·(2.5 − 1.75) and ½·½·(2 − 2.5), ½·½·(3 − 2.5).
    unit, ref = math.log(2.0), coin.ref_logits
    np.testing.assert_allclose(
        enumerable.state_values(coin, ref, kl_coef=1.0), [1.75 * unit, 2.5 * unit]
    )
    np.testing.assert_allclose(enumerable.state_visits(coin, ref), [1.0, 0.5])
    np.testing.assert_allclose(
        enumerable.objective_gradient(coin, ref, kl_coef=1.0),
        [[-0.375 * unit, 0.375 * unit], [-0.125 * unit, 0.125 * unit]],
    )
    # KL(π*‖ref) = ¼·log ½ + ¼·log 1 + ½·log 2 = ¼ log 2, E[r] = (¼ + ½ + 3/2) log 2.
    best = enumerable.optimal_policy(coin, kl_coef=1.0)
    assert enumerable.kl_to_reference(coin, best) == pytest.approx(0.25 * unit)
    assert enumerable.expected_score(coin, best) == pytest.approx(2.25 * unit)
    # At π* every token is as good as any other: Q(s, a) = V*(s) = log Z(s).
    np.testing.assert_allclose(
        enumerable.action_values(coin, best, kl_coef=1.0),
        [[math.log(4)] * 2, [math.log(6)] * 2],  # Z() = 4, Z(1,) = ½·4 + ½·8
    )


def test_every_response_is_listed_once(task):
    n = task.vocabulary_size - 1
    num_prefixes = sum(n**t for t in range(task.max_steps))
    responses = task.responses
    assert len(task.prefixes) == num_prefixes
    assert len(responses.lengths) == num_prefixes + n**task.max_steps
    listed = {
        tuple(row[:length])
        for row, length in zip(responses.tokens, responses.lengths, strict=True)
    }
    assert len(listed) == len(responses.lengths)
    for response in listed:
        assert task.stop_token not in response[:-1]
    stopped = np.array(
        [
            row[length - 1] == task.stop_token
            for row, length in zip(responses.tokens, responses.lengths, strict=True)
        ]
    )
    np.testing.assert_array_equal(responses.truncated, ~stopped)


def test_transitions_and_token_scores_replay_every_response(task):
    responses = task.responses
    for k, length in enumerate(responses.lengths):
        state, collected = 0, []
        for t in range(length):
            assert state == responses.states[k, t]
            token = responses.tokens[k, t]
            collected.append(task.token_scores[state, token])
            state = task.transitions[state, token]
        assert state == len(task.prefixes)
        assert collected == [0.0] * (length - 1) + [task.scores[k]]


def test_probabilities_sum_to_one(task):
    for logits in random_policies(task, 5, scale=3.0):
        probs = np.exp(enumerable.response_logprobs(task, logits))
        assert probs.sum() == pytest.approx(1.0, abs=1e-12)
        visits = enumerable.state_visits(task, logits)
        assert visits[0] == pytest.approx(1.0, abs=1e-12)
        lengths = task.responses.lengths
        assert visits.sum() == pytest.approx(probs @ lengths, abs=1e-12)


def test_the_optimal_table_is_the_optimal_distribution(task):
    best = enumerable.optimal_policy(task, kl_coef=BETA)
    np.testing.assert_allclose(
        enumerable.response_logprobs(task, best),
        enumerable.optimal_response_logprobs(task, kl_coef=BETA),
        atol=1e-12,
    )
    np.testing.assert_allclose(np.exp(best).sum(axis=1), 1.0, atol=1e-12)


def test_the_optimum_is_the_largest_objective(task):
    best = enumerable.optimal_policy(task, kl_coef=BETA)
    highest = enumerable.optimal_objective(task, kl_coef=BETA)
    assert enumerable.objective(task, best, kl_coef=BETA) == pytest.approx(
        highest, abs=1e-12
    )
    for logits in random_policies(task, 100):
        assert enumerable.objective(task, logits, kl_coef=BETA) < highest


def test_what_a_policy_lacks_is_its_divergence_from_the_optimum(task):
    # J* − J(π) = β · KL(π ‖ π*), exact at every π, and so a check of J, J* and π*
    # at once.
    log_best = enumerable.optimal_response_logprobs(task, kl_coef=BETA)
    highest = enumerable.optimal_objective(task, kl_coef=BETA)
    for logits in random_policies(task, 5):
        logprobs = enumerable.response_logprobs(task, logits)
        divergence = np.exp(logprobs) @ (logprobs - log_best)
        lacking = highest - enumerable.objective(task, logits, kl_coef=BETA)
        assert lacking == pytest.approx(BETA * divergence, abs=1e-12)


def test_the_value_of_the_empty_prefix_is_the_objective(task):
    for logits in random_policies(task, 5):
        values = enumerable.state_values(task, logits, kl_coef=BETA)
        assert values[0] == pytest.approx(
            enumerable.objective(task, logits, kl_coef=BETA), abs=1e-12
        )


def test_the_gradient_vanishes_at_the_optimum(task):
    best = enumerable.optimal_policy(task, kl_coef=BETA)
    np.testing.assert_allclose(
        enumerable.objective_gradient(task, best, kl_coef=BETA), 0.0, atol=1e-12
    )
    elsewhere = enumerable.objective_gradient(task, task.ref_logits, kl_coef=BETA)
    assert np.abs(elsewhere).max() > 0.01


def test_gradient_against_finite_differences(task):
    (logits,) = random_policies(task, 1)
    gradient = enumerable.objective_gradient(task, logits, kl_coef=BETA)
    step = 1e-5
    numeric = np.zeros_like(logits)
    for entry in np.ndindex(*logits.shape):
        above, below = logits.copy(), logits.copy()
        above[entry] += step
        below[entry] -= step
        numeric[entry] = (
            enumerable.objective(task, above, kl_coef=BETA)
            - enumerable.objective(task, below, kl_coef=BETA)
        ) / (2 * step)
    # Central differences err by step² · J''' / 6 + 1e-16 / step, about 1e-10.
    np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-9)


def test_the_same_seed_gives_the_same_task():
    one, same, other = random_task(5), random_task(5), random_task(6)
    np.testing.assert_array_equal(one.scores, same.scores)
    np.testing.assert_array_equal(one.ref_logits, same.ref_logits)
    assert not np.isclose(one.scores, other.scores).any()


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"vocabulary_size": 1}, "vocabulary_size=1: expected at least 2"),
        ({"max_steps": 0}, "max_steps=0: expected at least 1"),
        ({"stop_token": 4}, "stop_token=4: expected a token, 0 to 3"),
        ({"stop_token": -1}, "stop_token=-1: expected a token, 0 to 3"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        random_task(0, **sizes)


def test_wrong_arrays_are_refused(coin):
    language = {"vocabulary_size": 2, "max_steps": 2, "stop_token": 0}
    with pytest.raises(ValueError, match=r"scores has shape \(2,\): expected \(3,\)"):
        EnumerableTask(**language, ref_logits=coin.ref_logits, scores=np.zeros(2))
    with pytest.raises(ValueError, match=r"ref_logits has shape \(3, 2\): expected"):
        EnumerableTask(**language, ref_logits=np.zeros((3, 2)), scores=coin.scores)


@pytest.mark.parametrize("kl_coef", [0.0, -1.0])
def test_without_a_kl_penalty_there_is_no_optimum(coin, kl_coef):
    for function in (
        enumerable.optimal_objective,
        enumerable.optimal_response_logprobs,
        enumerable.optimal_policy,
    ):
        with pytest.raises(ValueError, match=f"kl_coef={kl_coef}"):
            function(coin, kl_coef=kl_coef)

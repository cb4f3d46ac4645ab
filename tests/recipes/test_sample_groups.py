"""`group_sampling.py`: groups without a signal are replaced, as far as rounds allow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from option_flips import POLICY, SIZES, STOP, actor_params, configured

from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.data.text_data import PromptRow
from rlhf_jax.learner import ActorCritic, init_train_state
from rlhf_jax.learner.train_state import behavior_policy
from rlhf_jax.recipes.group_sampling import (
    Groups,
    ScoredResponses,
    fill,
)
from rlhf_jax.recipes.grpo import make_programs
from rlhf_jax.recipes.optimizers import make_grpo_optimizers
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch

G, N = 2, 4  # 8 answers of at most 4 tokens
FLAT = (1.0, 1.0)
SMALL = {"group_size": G, "batch_size": G * N, "resample": 3}
CONFIG = configured(GRPOConfig(**SIZES), SMALL)


def programs_of(config):
    models = PolicyModels(
        module=None, policy=POLICY, score_fn=None, reference=None, reward=None
    )
    optimizers, _ = make_grpo_optimizers(config)
    return make_programs(config, models, optimizers, stop_ids=(STOP,), pad_id=0)


@pytest.fixture(scope="module")
def programs():
    return programs_of(CONFIG)


@pytest.fixture(scope="module")
def state():
    optimizers, _ = make_grpo_optimizers(CONFIG)
    params = ActorCritic(actor=actor_params(0), critic={})
    return init_train_state(jax.random.key(5), params, optimizers, kl_coef=0.0)


def prompts_of(number):
    """Four prompts of one or two tokens; `1.2` is the third of the second round."""
    lengths = np.array([1, 2, 1, 2], np.int32)
    tokens = np.array([[7, number], [number, 1], [7, 2], [number, 3]], np.int32)
    names = [f"{number}.{row}" for row in range(N)]
    return PromptBatch(
        prompts=Prompts(tokens=tokens, lengths=lengths),
        rows=[PromptRow(prompt=name, columns={"answer": name}) for name in names],
    )


class Script:
    """Rewards by round, group and answer; and what was asked."""

    def __init__(self, rounds, metrics=()):
        self.rounds = [np.array(scores, np.float32) for scores in rounds]
        self.metrics = metrics
        self.asked = []

    def add_round(self, groups, rollout, batch):
        number = len(self.asked)
        assert batch.texts == [f"{number}.{i // G}" for i in range(N * G)]
        np.testing.assert_array_equal(batch.prompts.tokens, rollout.prompts.tokens)
        self.asked.append(jax.device_get(rollout))
        scores = jnp.asarray(self.rounds[number].ravel())
        metrics = self.metrics[number] if self.metrics else {}
        groups.add(batch, ScoredResponses(rollout=rollout, scores=scores), metrics)


def sampled(script, state, programs, config=CONFIG):
    """Rounds as in the loop of `grpo.train`."""
    groups = Groups(config, programs.groups)
    for number, key in enumerate(jax.random.split(state.key, 1 + config.resample)):
        batch = prompts_of(number).repeat(G)
        prompts = jax.tree.map(jnp.asarray, batch.prompts)
        rollout = programs.sample(key, behavior_policy(state), prompts)
        script.add_round(groups, rollout, batch)
        if groups.all_have_signal:
            break
    return groups.scored, groups.batch, groups.metrics()


def assert_made_of(found, script, groups):
    """The batch is these groups, `(round, group)`, with all that belongs to them."""
    judged, batch, _ = found
    rows = [(number, group * G + i) for number, group in groups for i in range(G)]
    assert batch.texts == [f"{number}.{row // G}" for number, row in rows]
    assert batch.columns == {"answer": batch.texts}
    for row, (number, of_round) in enumerate(rows):
        want = jax.tree.map(lambda x, i=of_round: x[i], script.asked[number])
        got = jax.tree.map(lambda x, i=row: x[i], judged.rollout)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert judged.scores[row] == script.rounds[number].ravel()[of_round]
        drawn = prompts_of(number).take([of_round // G]).prompts
        np.testing.assert_array_equal(batch.prompts.tokens[row], drawn.tokens[0])
        assert batch.prompts.lengths[row] == drawn.lengths[0]
    assert len(batch.rows) == len(judged.scores) == len(rows)


def test_groups_without_a_signal_make_room(state, programs):
    script = Script(
        [
            [FLAT, (0, 2), FLAT, (3, 5)],
            [FLAT, (0, 1), FLAT, FLAT],  # one group for the first of the two
            [(4, 6), FLAT, (7, 9), FLAT],  # one for the second; the other is not used
        ]
    )
    found = sampled(script, state, programs)
    assert_made_of(found, script, [(1, 1), (0, 1), (2, 0), (0, 3)])
    # The last two prompts end as those of the round before: other keys, other answers.
    first, second, third = (x.logprobs[2 * G :] for x in script.asked)
    assert np.any(first != second) and np.any(second != third)
    metrics = found[2]
    tokens = sum(int(x.lengths.sum()) for x in script.asked)
    assert metrics["rollout/tokens"] == tokens > 3 * N * G
    assert metrics["group/no_signal"] == pytest.approx((2 + 3 + 2) / 12)
    assert metrics["group/resampled"] == 8  # groups, of two rounds more
    assert metrics["group/kept_without_signal"] == 0
    # Means over all that was drawn: 14, 7 and 30 in 8 answers each.
    assert metrics["reward/score_mean"] == pytest.approx((14 + 7 + 30) / 24)
    rounds = [np.std(scores) for scores in script.rounds]
    assert metrics["reward/score_std"] == pytest.approx(np.mean(rounds))


def test_no_further_round_where_all_have_a_signal(state, programs):
    script = Script([[(0, 1), (2, 0), (3, 1), (5, 4)]])
    found = sampled(script, state, programs)
    assert_made_of(found, script, [(0, 0), (0, 1), (0, 2), (0, 3)])
    assert len(script.asked) == 1
    metrics = found[2]
    assert metrics["rollout/tokens"] == script.asked[0].lengths.sum()
    names = ("no_signal", "resampled", "kept_without_signal")
    assert [metrics[f"group/{name}"] for name in names] == [0, 0, 0]
    assert metrics["reward/score_mean"] == 2.0


def test_rounds_are_bounded_and_what_is_left_is_kept(state, programs):
    nothing = [FLAT] * N
    script = Script([[(0, 1), *nothing[1:]], nothing, [*nothing[1:], (2, 3)], nothing])
    found = sampled(script, state, programs)
    # The last group of the third round takes the first place without a signal.
    assert_made_of(found, script, [(0, 0), (2, 3), (0, 2), (0, 3)])
    assert len(script.asked) == 1 + CONFIG.resample
    metrics = found[2]
    assert metrics["group/resampled"] == 12
    assert metrics["group/kept_without_signal"] == 2
    assert metrics["group/no_signal"] == pytest.approx((3 + 4 + 3 + 4) / 16)


def test_more_groups_with_a_signal_than_places(state, programs):
    script = Script([[(0, 1), FLAT, (1, 2), (2, 3)], [(5, 6), (6, 7), (7, 8), FLAT]])
    found = sampled(script, state, programs)
    assert_made_of(found, script, [(0, 0), (1, 0), (0, 2), (0, 3)])


def test_without_resampling_they_stay(state, programs):
    config = dataclasses.replace(CONFIG, resample=0)
    script = Script([[FLAT, (0, 2), FLAT, FLAT]])
    found = sampled(script, state, programs, config)
    assert_made_of(found, script, [(0, 0), (0, 1), (0, 2), (0, 3)])
    assert found[2]["group/no_signal"] == 0.75
    assert not found[2].keys() & {"group/resampled", "group/kept_without_signal"}


def judged(scores, lengths, truncated):
    """One group of answers of at most 4 tokens."""
    rows = len(scores)
    rollout = Rollout(
        prompts=Prompts(
            tokens=jnp.ones((rows, 1), jnp.int32), lengths=jnp.ones(rows, jnp.int32)
        ),
        responses=jnp.ones((rows, 4), jnp.int32),
        lengths=jnp.array(lengths),
        truncated=jnp.array(truncated),
        logprobs=jnp.zeros((rows, 4)),
    )
    return ScoredResponses(rollout=rollout, scores=jnp.array(scores, jnp.float32))


@pytest.mark.parametrize(
    ("changes", "scores", "signal"),
    [  # answers of 1, 2, 3 and 4 tokens; the last was cut off
        ({}, (0, 0, 0, 0), False),
        ({}, (0, 0, 0, 1), True),
        # Four wrong answers that differ only by the ramp would learn to be short.
        ({"scores.overlong_buffer": 3}, (0, 0, 0, 0), False),
        ({"scores.overlong_buffer": 3}, (0, 1, 0, 0), True),
        ({"scores.missing_eos": "subtract"}, (0, 0, 0, 0), False),
        # Raw scores differ where clipped ones do not.
        ({"scores.clip": 2.0}, (3, 4, 3, 3), True),
        # The only answer that differs is not trained on.
        ({"scores.missing_eos": "mask"}, (0, 0, 0, 1), False),
        ({"scores.missing_eos": "mask"}, (0, 1, 0, 1), True),
    ],
)
def test_a_signal_is_in_raw_scores_of_what_is_trained_on(changes, scores, signal):
    config = configured(CONFIG, {"group_size": 4, **changes})
    group = judged(scores, [1, 2, 3, 4], [False, False, False, True])
    np.testing.assert_array_equal(programs_of(config).groups.signal(group), [signal])


def test_one_trained_answer_has_nothing_to_differ_from():
    config = configured(CONFIG, {"group_size": 4, "scores.missing_eos": "mask"})
    group = judged((0, 1, 2, 3), [1, 4, 4, 4], [False, True, True, True])
    np.testing.assert_array_equal(programs_of(config).groups.signal(group), [False])


def test_groups_that_are_left_out_of_the_loss_are_no_signal(state, programs):
    config = configured(CONFIG, {"scores.missing_eos": "mask", "resample": 0})
    masking = dataclasses.replace(programs, groups=programs_of(config).groups)
    script = Script([[(0, 1)] * N])
    found = sampled(script, state, masking, config)
    # Of two answers both have to be trained on for their scores to differ.
    left_out = script.asked[0].truncated.reshape(N, G).any(axis=1)
    assert found[2]["group/no_signal"] == left_out.mean() > 0


def test_what_functions_say_is_averaged_and_failures_are_added(state, programs):
    nothing, full = [FLAT] * N, [(0, 1)] * N
    said = [
        {"reward/exact": 0.25, "reward/failures": 2.0},
        {"reward/exact": 0.75, "reward/failures": 3.0},
    ]
    script = Script([nothing, full], said)
    found = sampled(script, state, programs)
    assert_made_of(found, script, [(1, 0), (1, 1), (1, 2), (1, 3)])
    assert found[2]["reward/exact"] == 0.5
    assert found[2]["reward/failures"] == 5


def test_an_older_policy_answers_where_there_is_one(state, programs):
    script = [Script([[(0, 1)] * N]) for _ in range(3)]
    sampled(script[0], state, programs)
    kept = dataclasses.replace(state, old_policy=actor_params(1))
    sampled(script[1], kept, programs)
    alone = ActorCritic(actor=actor_params(1), critic={})
    sampled(script[2], dataclasses.replace(state, params=alone), programs)
    first, older, other = (x.asked[0].logprobs for x in script)
    np.testing.assert_array_equal(older, other)
    assert np.any(first != older)


@pytest.mark.parametrize(
    ("signal", "drawn", "groups", "after"),
    [
        ([1, 1, 1], [1, 0, 1], [0, 1, 2], [1, 1, 1]),
        ([0, 1, 0], [0, 0, 0], [0, 1, 2], [0, 1, 0]),
        ([0, 1, 0], [0, 1, 0], [4, 1, 2], [1, 1, 0]),
        ([0, 1, 0], [1, 1, 1], [3, 1, 4], [1, 1, 1]),
        ([0, 0, 0], [0, 0, 1], [5, 1, 2], [1, 0, 0]),
    ],
)
def test_fresh_groups_take_the_places_in_order(signal, drawn, groups, after):
    before = np.array(signal, bool)
    index, filled = fill(before, np.array(drawn, bool), 3)
    np.testing.assert_array_equal(index[::3] // 3, groups)
    np.testing.assert_array_equal(index, [3 * g + i for g in groups for i in range(3)])
    np.testing.assert_array_equal(filled, np.array(after, bool))
    np.testing.assert_array_equal(before, np.array(signal, bool))  # not written to

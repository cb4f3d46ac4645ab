"""PPO against the answer: on a language small enough to enumerate, both are known.

The expected gradient of PPO's loss, summed over every response, must be the gradient
of J(π) = E[r] − β · KL(π ‖ π_ref); and a tabular actor and critic, trained by the same
functions as any language model, must reach the policy that maximises J.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import Prompts, aggregate, clipped_policy_loss, gae, shape_rewards
from rlhf_jax.learner import (
    ActorCritic,
    init_train_state,
    make_optimizer,
    make_schedule,
    make_update,
    ppo_objective,
    separate_networks,
    step_keys,
)
from rlhf_jax.rollout import (
    generate,
    make_experience,
    score_rollout,
    token_logprobs_from_logits,
    uncached_decoding,
    values_from_sequence,
)
from rlhf_jax.tasks import enumerable

BETA = 0.5
LANGUAGE = enumerable.random_task(0)  # all tasks here have its tokens and steps
RESPONSES = LANGUAGE.responses

# ‖∇ − ∇J‖ / ‖∇J‖ that float32 may leave: eps is 1.2e-7, and 1e-7 to 3e-7 is measured.
FLOAT32 = 1e-6


# ---- the expected gradient, summed over every response ----


def response_logprobs(logits):
    """`[K, T]`: log π of every token of every response."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return logprobs[RESPONSES.states, RESPONSES.tokens]


@functools.partial(jax.jit, static_argnames="estimator")
def shaped_rewards(logits, ref_logits, scores, *, estimator):
    """`[K, T]`, by the library."""
    return shape_rewards(
        scores,
        response_logprobs(logits),
        response_logprobs(ref_logits),
        jnp.asarray(RESPONSES.mask),
        kl_coef=BETA,
        estimator=estimator,
    )[0]


@jax.jit
def advantages_and_returns(rewards, values, lam):
    """`[K, T]` twice, by the library, from values per prefix."""
    per_token = values[RESPONSES.states]
    return gae(rewards, per_token, jnp.asarray(RESPONSES.mask), lam=lam)


@functools.partial(jax.jit, static_argnames="mode")
def ppo_gradient(logits, advantages, weights, *, mode):
    """`[N, V]`: −∇ of PPO's loss at ratio 1, each response with its weight."""
    old_logprobs = response_logprobs(logits)

    def loss(logits):
        mask = jnp.asarray(RESPONSES.mask)
        new_logprobs = response_logprobs(logits)
        terms = clipped_policy_loss(new_logprobs, old_logprobs, advantages, mask)
        return aggregate(weights[:, None] * terms, mask, mode=mode)

    return -jax.grad(loss)(logits)


class Everything:
    """Every response of a task at once, under a random policy."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(100 + seed)
        self.task = enumerable.random_task(seed)
        # Rounded, so that the library in float32 and the oracle see the same policy.
        self.logits = rng.standard_normal(self.task.ref_logits.shape).astype(np.float32)
        self.probs = np.exp(enumerable.response_logprobs(self.task, self.logits))
        self.exact_values = enumerable.state_values(
            self.task, self.logits, kl_coef=BETA
        )
        self.wrong_values = rng.standard_normal(len(self.task.prefixes))
        self.exact_gradient = enumerable.objective_gradient(
            self.task, self.logits, kl_coef=BETA
        )

    def rewards(self, estimator="k1"):
        return shaped_rewards(
            self.logits,
            self.task.ref_logits.astype(np.float32),
            self.task.scores.astype(np.float32),
            estimator=estimator,
        )

    def gradient(self, values, *, lam, estimator="k1", mode="token-sum", divisor=1):
        """Expected PPO gradient; `divisor` is what `mode` divides the batch by."""
        advantages, _ = advantages_and_returns(
            self.rewards(estimator), values.astype(np.float32), lam
        )
        weights = (divisor * self.probs).astype(np.float32)
        return np.asarray(ppo_gradient(self.logits, advantages, weights, mode=mode))

    def error(self, gradient):
        """‖gradient − ∇J‖ / ‖∇J‖."""
        exact = self.exact_gradient
        return np.linalg.norm(gradient - exact) / np.linalg.norm(exact)


@pytest.fixture(scope="module", params=[0, 1, 2])
def everything(request):
    return Everything(request.param)


def test_expected_shaped_rewards_are_the_objective(everything):
    total = everything.probs @ np.asarray(everything.rewards()).sum(axis=1)
    exact = enumerable.objective(everything.task, everything.logits, kl_coef=BETA)
    assert total == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    "critic, lam", [("exact", 0.0), ("exact", 0.9), ("wrong", 1.0)]
)
def test_expected_returns_are_the_values(everything, critic, lam):
    # Monte-Carlo returns whatever the critic says; below λ = 1 the exact V is the
    # fixed point of the critic's targets.
    values = everything.exact_values if critic == "exact" else everything.wrong_values
    _, returns = advantages_and_returns(
        everything.rewards(), values.astype(np.float32), lam
    )
    mask = RESPONSES.mask
    total = np.bincount(
        RESPONSES.states[mask],
        weights=(everything.probs[:, None] * np.asarray(returns))[mask],
    )
    mean = total / enumerable.state_visits(everything.task, everything.logits)
    np.testing.assert_allclose(mean, everything.exact_values, rtol=1e-5, atol=1e-6)


def test_with_monte_carlo_returns_any_critic_gives_the_exact_gradient(everything):
    for values in (everything.exact_values, everything.wrong_values):
        gradient = everything.gradient(values, lam=1.0)
        assert everything.error(gradient) < FLOAT32


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0])
def test_below_lambda_one_the_critic_must_be_exact(everything, lam):
    exact = everything.gradient(everything.exact_values, lam=lam)
    assert everything.error(exact) < FLOAT32
    # A critic of pure noise: off by 5 to 19 % of ‖∇J‖ at λ = .95, by 57 to 170 % at
    # .5, by 151 to 336 % at 0.
    biased = everything.gradient(everything.wrong_values, lam=lam)
    assert everything.error(biased) > 0.04


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_only_k1_in_the_reward_has_the_gradient_of_the_kl(everything, estimator):
    # E[k3] is the KL as well, but its reward's policy gradient is not the KL's: off by
    # 50 to 65 % of ‖∇J‖ for k2, by 71 to 98 % for k3.
    gradient = everything.gradient(
        everything.exact_values, lam=1.0, estimator=estimator
    )
    assert everything.error(gradient) > 0.4


def test_reductions_that_divide_a_batch_by_one_number_are_exact(everything):
    divisors = {
        "token-sum": 1,
        "seq-mean-token-sum": len(RESPONSES.lengths),
        "seq-mean-token-sum-norm": RESPONSES.mask.size,  # rows times columns
        "token-mean": int(RESPONSES.lengths.sum()),
    }
    for mode, divisor in divisors.items():
        gradient = everything.gradient(
            everything.wrong_values, lam=1.0, mode=mode, divisor=divisor
        )
        assert everything.error(gradient) < FLOAT32, mode


def test_dividing_each_response_by_its_length_is_biased(everything):
    gradient = everything.gradient(
        everything.exact_values,
        lam=1.0,
        mode="seq-mean-token-mean",
        divisor=len(RESPONSES.lengths),
    )
    # Its best multiple is off by 15 to 54 %: no learning rate mends the direction.
    exact = everything.exact_gradient
    gradient = gradient * np.sum(gradient * exact) / np.sum(gradient**2)
    assert everything.error(gradient) > 0.1


# ---- training ----

BATCH, UPDATES, EPOCHS, MINIBATCHES = 1024, 150, 2, 4
BOS = LANGUAGE.vocabulary_size  # no token of a response


def states_read(tokens):
    """`[B, S]` → `[B, S]`: the prefix read through each column; column 0 holds BOS."""
    transitions = jnp.asarray(LANGUAGE.transitions)

    def read(state, token):
        state = transitions[state, token]
        return state, state

    empty = jnp.zeros(tokens.shape[0], jnp.int32)
    _, after = jax.lax.scan(read, empty, tokens[:, 1:].T)
    return jnp.concatenate([empty[:, None], after.T], axis=1)


def with_end(table):
    """One row more, for when the response is over: NaN, for nobody may use it."""
    return jnp.concatenate([table, jnp.full_like(table[:1], jnp.nan)])


def look_up(table, tokens, mask):
    """Logits or values, by the prefix read."""
    return with_end(table)[states_read(tokens)]


def score(token_scores, tokens, mask):
    """The reward model: what the last token of the response pays."""
    per_token = with_end(token_scores)[states_read(tokens)[:, :-1], tokens[:, 1:]]
    return jnp.sum(jnp.where(mask[:, 1:], per_token, 0.0), axis=1)


TOKEN_LOGPROBS_FN = token_logprobs_from_logits(look_up)
VALUES_FN = values_from_sequence(look_up)
PREFILL, DECODE = uncached_decoding(look_up)


def sample_experience(state, reference, token_scores, temperature):
    """One rollout of the actor, scored and shaped: the recipe's path."""
    rollout_key, _ = step_keys(state)
    prompts = Prompts(
        tokens=jnp.full((BATCH, 1), BOS, jnp.int32),
        lengths=jnp.ones(BATCH, jnp.int32),
    )
    rollout = generate(
        rollout_key,
        state.params.actor,
        prompts,
        prefill=PREFILL,
        decode=DECODE,
        max_new_tokens=LANGUAGE.max_steps,
        stop_ids=[LANGUAGE.stop_token],
        temperature=temperature,
        pad_id=1,  # a token like any other
    )
    scored = score_rollout(
        state.params.actor,
        state.params.critic,
        reference,
        score(token_scores, rollout.tokens, rollout.sequence_mask),
        rollout,
        token_logprobs_fn=TOKEN_LOGPROBS_FN,
        values_fn=VALUES_FN,
        temperature=temperature,
    )
    return make_experience(scored, kl_coef=state.kl_coef)[0]


def train(key, reference, token_scores, kl_coef, temperature):
    """PPO from the reference on, as one program; the parameters it ends with."""
    schedule = functools.partial(
        make_schedule, "linear", total_steps=UPDATES * EPOCHS * MINIBATCHES
    )
    optimizers = ActorCritic(
        actor=make_optimizer(schedule(learning_rate=0.03)),
        critic=make_optimizer(schedule(learning_rate=0.1)),
    )
    update = make_update(
        ppo_objective(
            separate_networks(token_logprobs_fn=TOKEN_LOGPROBS_FN, values_fn=VALUES_FN),
            temperature=temperature,
        ),
        optimizers,
        num_epochs=EPOCHS,
        num_minibatches=MINIBATCHES,
    )

    def ppo_step(state, _):
        experience = sample_experience(state, reference, token_scores, temperature)
        state, _ = update(state, experience)
        return state, None

    critic = jnp.zeros(reference.shape[0], jnp.float32)
    state = init_train_state(
        key, ActorCritic(actor=reference, critic=critic), optimizers, kl_coef=kl_coef
    )
    state, _ = jax.lax.scan(ppo_step, state, length=UPDATES)
    return state.params


@pytest.fixture(scope="module")
def trained():
    """Trains on task `seed`: the task, the policy's logits and the critic's values."""
    compiled = jax.jit(train)

    def run(seed, *, kl_coef=BETA, temperature=1.0):
        task = enumerable.random_task(seed)
        # Tables are divided by the temperature wherever they are used, so that the
        # language, its reference and its optimum are the same at every temperature.
        params = compiled(
            jax.random.key(seed),
            jnp.asarray(temperature * task.ref_logits, jnp.float32),
            jnp.asarray(task.token_scores, jnp.float32),
            kl_coef,
            temperature,
        )
        actor = np.asarray(params.actor, np.float64) / temperature
        return task, actor, np.asarray(params.critic, np.float64)

    return run


def share_of_optimum(task, logits):
    """How much of what can be gained over the reference is gained: 1 at π*."""
    start = enumerable.objective(task, task.ref_logits, kl_coef=BETA)
    best = enumerable.optimal_objective(task, kl_coef=BETA)
    return (enumerable.objective(task, logits, kl_coef=BETA) - start) / (best - start)


@pytest.mark.parametrize("seed, temperature", [(0, 1.0), (1, 0.7), (2, 1.5)])
def test_training_reaches_the_analytic_optimum(trained, seed, temperature):
    task, logits, values = trained(seed, temperature=temperature)
    # 99 % is the promise, of the gain as of J itself. It reaches 99.99 %, and 99.9 %
    # is asked for, since a β wrong by a tenth still earns 98.8 to 99.3 %.
    assert share_of_optimum(task, logits) > 0.999
    best = enumerable.optimal_objective(task, kl_coef=BETA)
    assert enumerable.objective(task, logits, kl_coef=BETA) > 0.999 * best > 0
    # The critic has learned V of that policy, to 0.1 % of its spread: at the optimum
    # every response of a state returns the same, so nothing is left but the average.
    exact = enumerable.state_values(task, logits, kl_coef=BETA)
    visits = enumerable.state_visits(task, logits)
    error = np.sqrt(np.average((values - exact) ** 2, weights=visits))
    spread = np.sqrt(np.average((exact - exact[0]) ** 2, weights=visits))
    assert error < 0.01 * spread


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_with_another_kl_coefficient_does_not(trained, seed):
    # So the threshold above can tell. Without a penalty the policy turns to the single
    # best response, for −1 to 65 % of the gain.
    task, logits, _ = trained(seed, kl_coef=0.0)
    assert share_of_optimum(task, logits) < 0.9
    task, logits, _ = trained(seed, kl_coef=0.9 * BETA)
    assert share_of_optimum(task, logits) < 0.995

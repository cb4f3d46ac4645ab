"""Expected gradients, summed over every response of a small language.

Responses of up to four tokens from a vocabulary of four: 121 of them, each with its
probability. So an expectation is a sum, not a sample. The formulas are the library's
(`make_experience`, `kl_estimate`, `clipped_policy_loss`, `aggregate`, `masked_whiten`),
compared with `rlhf_jax.tasks.enumerable`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import Prompts, aggregate, clipped_policy_loss, kl_estimate, masked_whiten
from rlhf_jax.algo.options import AdvantageOptions, KLOptions
from rlhf_jax.algo.types import Array, Experience, Rollout, ScoredRollout
from rlhf_jax.rollout import make_experience
from rlhf_jax.tasks import enumerable

BETA = 0.5  # scores have standard deviation 1

experience_of = jax.jit(make_experience, static_argnames=("kl", "scores", "advantages"))


class Case:
    """A task, a policy at some distance from its reference, and exact quantities."""

    def __init__(
        self, seed: int, *, distance: float = 1.0, stop_logit: float = 0.0, **sizes: int
    ):
        """Everything is determined by the seed.

        Args:
            seed: seed of task, policy and noise.
            distance: standard deviation of the noise on the reference's logits.
            stop_logit: added to the reference's logit of the stop token.
            sizes: `vocabulary_size` and `max_steps`.
        """
        task = enumerable.random_task(seed, **sizes)
        is_stop = np.arange(task.vocabulary_size) == task.stop_token
        self.task = dataclasses.replace(
            task, ref_logits=task.ref_logits + stop_logit * is_stop
        )
        self.responses = self.task.responses
        rng = np.random.default_rng(1000 + seed)
        noise = rng.standard_normal(self.task.ref_logits.shape)
        # Rounded, so that the library in float32 and the oracle see the same policy.
        logits = (self.task.ref_logits + distance * noise).astype(np.float32)
        self.logits = logits
        self.critic_noise = rng.standard_normal(len(noise))
        self.probs = np.exp(enumerable.response_logprobs(self.task, logits))
        self.visits = enumerable.state_visits(self.task, logits)
        self.values = enumerable.state_values(self.task, logits, kl_coef=BETA)
        self.gradient = enumerable.objective_gradient(self.task, logits, kl_coef=BETA)
        self.kl = enumerable.kl_to_reference(self.task, logits)
        unscored = dataclasses.replace(self.task, scores=0.0 * self.task.scores)
        self.kl_gradient = -enumerable.objective_gradient(unscored, logits, kl_coef=1.0)
        self.logprobs = self.token_logprobs(logits)
        self.ref_logprobs = self.token_logprobs(self.task.ref_logits)

    def token_logprobs(self, logits: np.ndarray) -> np.ndarray:
        """`[K, T]` float32: log π of every token of every response."""
        logprobs = enumerable.log_softmax(logits).astype(np.float32)
        return logprobs[self.responses.states, self.responses.tokens]

    def experience(
        self,
        critic: np.ndarray,
        *,
        slow_critic: np.ndarray | None = None,
        scores: np.ndarray | None = None,
        **options: Any,
    ) -> Experience:
        """Every response once, by the library; a critic is `[N]`, one V per prefix."""
        responses, rows = self.responses, len(self.responses.lengths)

        def per_token(critic: np.ndarray) -> Array:
            return jnp.asarray(critic[responses.states], jnp.float32)

        rollout = Rollout(
            prompts=Prompts(
                tokens=jnp.zeros((rows, 1), jnp.int32),
                lengths=jnp.ones(rows, jnp.int32),
            ),
            responses=jnp.asarray(responses.tokens),
            lengths=jnp.asarray(responses.lengths),
            truncated=jnp.asarray(responses.truncated),
            logprobs=jnp.asarray(self.logprobs),
        )
        scored = ScoredRollout(
            rollout=rollout,
            logprobs=rollout.logprobs,
            ref_logprobs=jnp.asarray(self.ref_logprobs),
            values=per_token(critic),
            scores=jnp.asarray(self.task.scores if scores is None else scores, float),
            target_values=None if slow_critic is None else per_token(slow_critic),
        )
        return experience_of(scored, **options)[0]

    def loss_gradients(
        self, terms: Callable[[Array], Array], mode: Any = "token-sum"
    ) -> np.ndarray:
        """`[K, T]`: ∂L/∂log π(y_t | s_t), L each response's own loss, reduced.

        `terms` maps log-probabilities `[K, T]` to losses per token, unreduced.
        """
        mask = jnp.asarray(self.responses.mask)

        def total(logprobs: Array) -> Array:
            alone = jax.vmap(functools.partial(aggregate, mode=mode))
            return jnp.sum(alone(terms(logprobs)[:, None], mask[:, None]))

        return np.asarray(jax.grad(total)(jnp.asarray(self.logprobs)), np.float64)

    def policy_gradients(self, advantages: Any, mode: Any = "token-sum") -> np.ndarray:
        """`[K, T]`: the weight of ∇log π(y_t | s_t) in an ascent step, at ratio 1."""
        return -self.loss_gradients(
            functools.partial(
                clipped_policy_loss,
                old_logprobs=jnp.asarray(self.logprobs),
                advantages=jnp.asarray(advantages, jnp.float32),
                mask=jnp.asarray(self.responses.mask),
            ),
            mode,
        )

    def expected_gradient(self, weights: np.ndarray) -> np.ndarray:
        """`[N, V]`: E_y Σ_t weights(y, t) · ∇log π(y_t | s_t), over the logits."""
        mask = self.responses.mask
        total = np.zeros(self.logits.shape)
        np.add.at(
            total,
            (self.responses.states[mask], self.responses.tokens[mask]),
            (self.probs[:, None] * weights)[mask],
        )
        # ∂log π(a|s) / ∂logits(s, b) = [a = b] − π(b|s)
        policy = np.exp(enumerable.log_softmax(self.logits))
        return total - policy * total.sum(axis=1, keepdims=True)

    def gradient_variance(self, weights: np.ndarray) -> float:
        """E‖g − E g‖² of the gradient of one response."""
        mask = self.responses.mask
        policy = np.exp(enumerable.log_softmax(self.logits))[self.responses.states]
        # ‖∇log π(a|s)‖² = 1 − 2 π(a|s) + Σ_b π(b|s)²; no state comes twice.
        squares = 1 - 2 * np.exp(self.logprobs) + np.sum(policy**2, axis=2)
        second_moment = self.probs @ np.where(mask, weights**2 * squares, 0).sum(axis=1)
        return float(second_moment - np.sum(self.expected_gradient(weights) ** 2))


def relative_error(found: Any, want: Any) -> float:
    """‖found − want‖ / ‖want‖."""
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def cosine(found: np.ndarray, want: np.ndarray) -> float:
    """Of the angle between two gradients; NaN where `found` is 0 but for rounding."""
    size = np.linalg.norm(found) * np.linalg.norm(want)
    if np.linalg.norm(found) < 1e-5 * np.linalg.norm(want):
        return math.nan
    return float(np.sum(found * want) / size)


def error_of_direction(found: np.ndarray, want: np.ndarray) -> float:
    """What is left at the best learning rate, relative: the sine of the angle."""
    best = np.sum(found * want) / np.sum(found * found)
    return relative_error(best * found, want)


# ---- KL estimators ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLResult:
    """One estimator in one case, against the exact KL of responses."""

    value_error: float  # of E Σ_t k_t
    value_noise: float  # standard deviation of Σ_t k_t, over the KL
    loss_error: float  # of E ∇Σ_t k_t
    loss_cosine: float
    reward_error: float  # of the policy gradient of −Σ_t k_t


def kl_result(case: Case, **options: Any) -> KLResult:
    """See `KLResult`; `options` are those of `kl_estimate`."""
    per_token = np.asarray(
        kl_estimate(
            jnp.asarray(case.logprobs), jnp.asarray(case.ref_logprobs), **options
        )
    )
    sums = np.where(case.responses.mask, np.float64(per_token), 0.0).sum(axis=1)
    mean = case.probs @ sums
    in_loss = kl_loss_gradient(case, **options)

    in_reward = {k: v for k, v in options.items() if k != "straight_through"}
    experience = case.experience(
        np.zeros_like(case.values),
        scores=np.zeros_like(case.task.scores),
        kl_coef=1.0,
        kl=KLOptions(**in_reward),
        advantages=AdvantageOptions(lam=1.0, whiten="none"),
    )
    penalty = -case.expected_gradient(case.policy_gradients(experience.advantages))
    return KLResult(
        value_error=relative_error(mean, case.kl),
        value_noise=math.sqrt(case.probs @ (sums - mean) ** 2) / case.kl,
        loss_error=relative_error(in_loss, case.kl_gradient),
        loss_cosine=cosine(in_loss, case.kl_gradient),
        reward_error=relative_error(penalty, case.kl_gradient),
    )


def kl_loss_gradient(case: Case, **options: Any) -> np.ndarray:
    """`[N, V]`: E ∇Σ_t k_t; `options` are those of `kl_estimate`."""
    reference = jnp.asarray(case.ref_logprobs)
    estimate = functools.partial(kl_estimate, ref_logprobs=reference, **options)
    return case.expected_gradient(case.loss_gradients(estimate))


def per_state_kl_gradient(case: Case) -> np.ndarray:
    """`[N, V]`: Σ_s d(s) ∇KL(π(·|s) ‖ π_ref(·|s)), the weights d of states held fixed.

    The gradient of the KL of responses is this plus Σ_s ∇d(s) KL(s): a token also
    affects which states, and so which divergences, follow.
    """
    logprobs = enumerable.log_softmax(case.logits)
    policy = np.exp(logprobs)
    log_ratio = logprobs - enumerable.log_softmax(case.task.ref_logits)
    kl = (policy * log_ratio).sum(axis=1, keepdims=True)
    return case.visits[:, None] * policy * (log_ratio - kl)


def whole_answer_k2_gradient(case: Case) -> np.ndarray:
    """`[N, V]`: E ∇ ½(Σ_t ℓ_t)², k2 of the response in place of its tokens."""
    mask = jnp.asarray(case.responses.mask)

    def k2_of_answer(logprobs: Array) -> Array:
        both = (logprobs, jnp.asarray(case.ref_logprobs))
        sums = [jnp.sum(jnp.where(mask, x, 0.0), axis=1, keepdims=True) for x in both]
        k2 = kl_estimate(*sums, estimator="k2")
        return jnp.where(jnp.arange(mask.shape[1]) == 0, k2, 0.0)  # counted once

    return case.expected_gradient(case.loss_gradients(k2_of_answer))


# ---- advantages ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageResult:
    """One estimator with one critic."""

    gradient: np.ndarray  # [N, V], expected policy gradient
    bias: float  # ‖gradient − ∇J‖ / ‖∇J‖
    variance: float  # of one response's gradient, over ‖∇J‖²
    target_bias: float  # RMS over visited states of E[R | s] − V^π(s)


def advantage_result(
    case: Case,
    options: AdvantageOptions,
    critic: np.ndarray,
    slow_critic: np.ndarray | None = None,
) -> AdvantageResult:
    """See `AdvantageResult`; a critic is `[N]`, one value per prefix."""
    decay = None if slow_critic is None else 0.9  # any: its values are given
    experience = case.experience(
        critic,
        slow_critic=slow_critic,
        kl_coef=BETA,
        advantages=dataclasses.replace(options, whiten="none", slow_critic_decay=decay),
    )
    weights = case.policy_gradients(experience.advantages)
    gradient = case.expected_gradient(weights)

    mask, states = case.responses.mask, case.responses.states
    returns = case.probs[:, None] * np.asarray(experience.returns, np.float64)
    targets = np.bincount(states[mask], returns[mask]) / case.visits
    missed = np.average((targets - case.values) ** 2, weights=case.visits)
    return AdvantageResult(
        gradient=gradient,
        bias=relative_error(gradient, case.gradient),
        variance=case.gradient_variance(weights) / float(np.sum(case.gradient**2)),
        target_bias=math.sqrt(missed),
    )


def wrong_critic(case: Case, error: float) -> np.ndarray:
    """`[N]`: the exact values and noise of RMS `error` over the visited states."""
    size = math.sqrt(np.average(case.critic_noise**2, weights=case.visits))
    return case.values + error * case.critic_noise / size


# ---- reduction and whitening ----


def exact_advantages(case: Case) -> np.ndarray:
    """`[K, T]`: returns minus the exact values."""
    options = AdvantageOptions(lam=1.0, whiten="none")
    experience = case.experience(case.values, kl_coef=BETA, advantages=options)
    return np.asarray(experience.advantages)


def token_mean_gradient(case: Case, weights: np.ndarray, batch: int) -> np.ndarray:
    """`[N, V]`: E[Σ_i g_i / Σ_i n_i] over batches of independent responses.

    Exact for any size: the other responses matter only by their number of tokens, whose
    distribution is a convolution.

    Args:
        case: whose responses.
        weights: `[K, T]`, of ∇log π, before the division by the batch's tokens.
        batch: responses in a batch.
    """
    lengths = case.responses.lengths
    of_one = np.bincount(lengths, case.probs)
    others = functools.reduce(np.convolve, [of_one] * (batch - 1), np.ones(1))
    total = lengths[:, None] + np.arange(len(others))
    share = batch * (others / total).sum(axis=1)  # E[B / Σ n | the response's own n]
    return case.expected_gradient(share[:, None] * weights)


def whitened_gradient(
    case: Case, advantages: np.ndarray, batch: int, *, center: bool
) -> np.ndarray:
    """`[N, V]`: token mean of whitened advantages, over all possible batches.

    Batches of equal content are counted once, with their multinomial weight. For few
    responses and small batches only.
    """
    rows, counts = _batches(len(case.probs), batch)
    ways = math.factorial(batch) / _FACTORIALS[counts].prod(axis=1)
    probs = ways * case.probs[rows].prod(axis=1)
    shares = _token_shares(
        jnp.asarray(advantages), jnp.asarray(case.responses.mask), rows, center=center
    )
    total = np.zeros(case.responses.mask.shape)
    np.add.at(total, rows, probs[:, None, None] * np.asarray(shares, np.float64))
    # `total` is p(y) · E[B · A / Σ n | y is in the batch]
    return case.expected_gradient(case.policy_gradients(total / case.probs[:, None]))


_FACTORIALS = np.array([math.factorial(n) for n in range(20)], np.float64)


@functools.cache
def _batches(num: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every batch up to its order, `[M, B]` rows, and how often each row is in it."""
    rows = list(itertools.combinations_with_replacement(range(num), size))
    batches = np.array(rows, np.int32)
    return batches, (batches[:, :, None] == np.arange(num)).sum(axis=1)


@functools.partial(jax.jit, static_argnames="center")
def _token_shares(
    advantages: Array, mask: Array, batches: Array, *, center: bool
) -> Array:
    """`[M, B, T]`: whitened advantages over the tokens of their batch."""

    @jax.vmap
    def of_batch(rows: Array) -> Array:
        whitened = masked_whiten(advantages[rows], mask[rows], center=center)
        return whitened / jnp.sum(mask[rows])

    return of_batch(batches)

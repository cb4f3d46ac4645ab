"""Makes experience from a scored rollout, for PPO."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.algo.advantages import gae, length_adaptive_lam, n_step_returns
from rlhf_jax.algo.diagnostics import explained_variance
from rlhf_jax.algo.masking import include_end_state, masked_mean, masked_whiten
from rlhf_jax.algo.options import (
    AdvantageOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
    check_bootstrap,
    require_defaults,
)
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.scores import (
    ScoreMoments,
    normalize_scores,
    penalize_missing_eos,
    score_std,
    soft_overlong_penalty,
)
from rlhf_jax.algo.types import Array, Experience, Rollout, Scalar, ScoredRollout
from rlhf_jax.rollout.sampler_mismatch import mismatch_weights, share_beyond_bounds

AdvantageFn = Callable[[Array, Array, Array], tuple[Array, Array]]
"""`(rewards, values, mask) -> (advantages, returns)`, all `[B, T]`; like `gae`."""


def make_experience(
    scored: ScoredRollout,
    *,
    kl_coef: Scalar,
    kl: KLOptions = KLOptions(),
    scores: ScoreOptions = ScoreOptions(),
    advantages: AdvantageOptions = AdvantageOptions(),
    policy_loss: PolicyLossOptions = PolicyLossOptions(),
    score_moments: ScoreMoments | None = None,
    advantage_fn: AdvantageFn | None = None,
) -> tuple[Experience, dict[str, Array]]:
    """Shaped rewards, advantages and returns of one rollout.

    Order: scores (`final_scores`); score at the end minus β·KL at every token, and
    reward whitening (`token_rewards`); advantages and returns; advantage whitening
    over the response tokens. Returns are those of the raw advantages.

    Args:
        scored: the rollout with log-probabilities, values and scores.
        kl_coef: `[]`, β of this step; `kl.coef` is only the initial value.
        kl: KL options. With `place="loss"` the experience carries β to the loss.
        scores: from scores to rewards; `normalization` must match `score_moments`.
        advantages: from rewards to advantages. With `whiten="minibatch"` they are not
            whitened here; use `whiten_minibatch` in the update.
        policy_loss: used for `sampler_correction`.
        score_moments: for score normalization; None: no normalization.
        advantage_fn: instead of GAE and the other estimators in `advantages`; of those
            options only whitening is then used. It gets token rewards, values and the
            mask of rewarded states, all 0 or False on padding.

    Returns:
        The experience and scalar float32 metrics over the whole batch. `kl/sequence`
        is the mean over sequences of Σ_t (log π − log π_ref), in nats, for any
        estimator used in the rewards; omitted without a reference.

    Raises:
        ValueError: on contradictory options, or if they need something missing in
            `scored` or `score_moments`.
    """
    for name, options in (
        ("kl", kl),
        ("scores", scores),
        ("advantages", advantages),
        ("policy_loss", policy_loss),
    ):
        options.validate(name)
    check_bootstrap(advantages, scores)
    if scored.values is None:
        raise ValueError("scored.values is None: make_experience needs a critic's")
    states = rewarded_states(scored.rollout.mask, scores)
    rewards = token_rewards(
        scored,
        kl_coef=kl_coef,
        kl=kl,
        scores=scores,
        score_moments=score_moments,
        bootstrap_truncated=advantages.bootstrap_truncated,
    )
    valued = scored.rollout.mask if scores.end_value == "zero" else states
    values = jnp.where(valued, scored.values, 0.0)
    if advantage_fn is None:
        raw, returns = _advantages_and_returns(
            scored, values, rewards, states, valued, advantages
        )
    else:
        why = "has no effect with advantage_fn"
        require_defaults(advantages, "advantages", *_OF_ESTIMATORS, why=why)
        raw, returns = advantage_fn(rewards, values, states)
    used = used_responses(scored.rollout, scores)[:, None]
    mask = learned = scored.rollout.mask & used
    if scores.end_value == "learned":
        learned = states & used
    if advantages.whiten in ("batch", "shard"):
        raw = _whitened(raw, mask, advantages)
    old_values = jnp.where(learned, scored.values, 0.0)
    returns = jnp.where(learned, returns, 0.0)
    experience = dataclasses.replace(
        actor_experience(
            scored, raw, mask, kl_coef=kl_coef, kl=kl, policy_loss=policy_loss
        ),
        old_values=old_values,
        returns=returns,
        value_mask=learned if scores.position == "after_last_token" else None,
    )
    metrics = rollout_metrics(scored, rewards, kl_coef=kl_coef, kl=kl) | {
        **share_beyond_bounds(scored, mask, policy_loss),
        "value/explained_variance": explained_variance(old_values, returns, learned),
        "value/mean": masked_mean(old_values, learned),
        "value/return_mean": masked_mean(returns, learned),
    }
    if score_moments is not None:
        metrics["reward/normalization_mean"] = score_moments.mean
        metrics["reward/normalization_std"] = score_std(score_moments)
    return experience, metrics


_OF_ESTIMATORS = (
    "gamma",
    "lam",
    "value_lam",
    "lam_alpha",
    "n_steps",
    "bootstrap_truncated",
    "slow_critic_decay",
)


def used_responses(rollout: Rollout, options: ScoreOptions) -> Array:
    """`[B]` bool: the responses that are trained on."""
    if options.missing_eos == "mask":
        return ~rollout.truncated
    return jnp.ones_like(rollout.truncated)


def actor_experience(
    scored: ScoredRollout,
    advantages: Array,
    mask: Array,
    *,
    kl_coef: Scalar,
    kl: KLOptions,
    policy_loss: PolicyLossOptions,
) -> Experience:
    """The actor's experience, without old values and returns.

    Args:
        scored: the rollout with log-probabilities.
        advantages: `[B, T]` float32.
        mask: `[B, T]` bool, the tokens that are trained on.
        kl_coef: `[]`, β; with `kl.place="loss"` the experience carries it.
        kl: KL options.
        policy_loss: used for `sampler_correction`.
    """
    rollout = scored.rollout
    loss_kl_coef = None
    if kl.place == "loss" and scored.ref_logprobs is None:
        raise ValueError('kl.place="loss" needs the reference\'s ref_logprobs')
    if kl.place == "loss":
        loss_kl_coef = jnp.full(rollout.lengths.shape, kl_coef, jnp.float32)

    def masked(x: Array) -> Array:
        return jnp.where(mask, x, 0.0)

    return Experience(
        tokens=rollout.tokens,
        sequence_mask=rollout.sequence_mask,
        mask=mask,
        old_logprobs=masked(scored.logprobs),
        ref_logprobs=None
        if scored.ref_logprobs is None
        else masked(scored.ref_logprobs),
        old_values=None,
        advantages=masked(advantages),
        returns=None,
        weights=mismatch_weights(scored, mask, policy_loss),
        kl_coef=loss_kl_coef,
    )


def rewarded_states(mask: Array, options: ScoreOptions) -> Array:
    """`[B, T]` bool: the response tokens, and the state after them if it gets a
    reward."""
    after_last = options.position == "after_last_token"
    return include_end_state(mask) if after_last else mask


def token_rewards(
    scored: ScoredRollout,
    *,
    kl_coef: Scalar,
    kl: KLOptions = KLOptions(),
    scores: ScoreOptions = ScoreOptions(),
    score_moments: ScoreMoments | None = None,
    bootstrap_truncated: bool = False,
) -> Array:
    """`[B, T]` float32: the score at the end, minus β·KL at every token, whitened.

    With `bootstrap_truncated` a truncated response gets no score: the advantage
    estimator adds the critic's value at its end instead.
    """
    mask, ref_logprobs = scored.rollout.mask, scored.logprobs
    if kl.place == "reward":
        if scored.ref_logprobs is None:
            raise ValueError('kl.place="reward" needs the reference\'s ref_logprobs')
        ref_logprobs = scored.ref_logprobs
    paid = final_scores(scored.rollout, scored.scores, scores, score_moments)
    if bootstrap_truncated:
        paid = jnp.where(scored.rollout.truncated, 0.0, paid)
    rewards, _ = shape_rewards(
        paid,
        scored.logprobs,
        ref_logprobs,  # without a KL in the reward, the policy itself: a KL of 0
        mask,
        kl_coef=kl_coef,
        estimator=kl.estimator,
        log_ratio_clamp=kl.log_ratio_clamp,
        clamp=kl.clamp,
        score_position=scores.position,
    )
    if scores.whiten_rewards:
        rewards = masked_whiten(rewards, rewarded_states(mask, scores), center=False)
    return rewards


def final_scores(
    rollout: Rollout,
    scores: Array,
    options: ScoreOptions,
    moments: ScoreMoments | None = None,
) -> Array:
    """`[B]` float32 scores, normalized, clipped, penalized for a missing or late
    stop."""
    scores = scores.astype(jnp.float32)
    if (moments is None) != (options.normalization == "none"):
        raise ValueError(
            f"scores.normalization={options.normalization!r}: score_moments must be "
            f"{'given' if moments is None else 'left out'}"
        )
    if moments is not None:
        scores = normalize_scores(scores, moments)
    if options.clip is not None:
        scores = jnp.clip(scores, -options.clip, options.clip)
    if options.missing_eos not in ("keep", "mask"):
        scores = penalize_missing_eos(
            scores,
            rollout.truncated,
            penalty=options.missing_eos_penalty,
            mode=options.missing_eos,
        )
    if options.overlong_buffer is not None:
        scores += options.overlong_penalty * soft_overlong_penalty(
            rollout.lengths,
            limit=rollout.responses.shape[1],
            buffer=options.overlong_buffer,
        )
    return scores


def whiten_minibatch(experience: Experience, options: AdvantageOptions) -> Experience:
    """The experience of one optimizer step, with its advantages whitened."""
    whitened = _whitened(experience.advantages, experience.mask, options)
    return dataclasses.replace(experience, advantages=whitened)


def _whitened(advantages: Array, mask: Array, options: AdvantageOptions) -> Array:
    return masked_whiten(
        advantages,
        mask,
        center=options.center,
        ddof=options.ddof,
        shards=options.whiten_shards,  # 1, except for whiten="shard"
    )


def _advantages_and_returns(
    scored: ScoredRollout,
    values: Array,
    rewards: Array,
    states: Array,
    valued: Array,
    options: AdvantageOptions,
) -> tuple[Array, Array]:
    """Raw advantages and value targets, `[B, T]`; V = 0 in states not `valued`."""
    if options.n_steps is not None:
        returns = n_step_returns(
            rewards, values, states, n=options.n_steps, gamma=options.gamma
        )
        return returns - values, returns

    target_values = end_values = None
    if (options.slow_critic_decay is None) != (scored.target_values is None):
        raise ValueError(
            f"slow_critic_decay={options.slow_critic_decay}: give it together with "
            "target_values, from score_rollout(…, slow_critic=…)"
        )
    if scored.target_values is not None:
        target_values = jnp.where(valued, scored.target_values, 0.0)
    if options.bootstrap_truncated:
        if scored.end_values is None:
            raise ValueError(
                "bootstrap_truncated=True needs end_values: "
                "score_rollout(…, with_end_values=True)"
            )
        end_values = jnp.where(scored.rollout.truncated, scored.end_values, 0.0)

    def estimate(lam: Scalar) -> tuple[Array, Array]:
        return gae(
            rewards,
            values,
            states,
            gamma=options.gamma,
            lam=lam,
            target_values=target_values,
            end_values=end_values,
        )

    lam = options.lam
    if options.lam_alpha is not None:
        lam = length_adaptive_lam(scored.rollout.mask, alpha=options.lam_alpha)
    advantages, returns = estimate(lam)
    if options.value_lam is not None:
        _, returns = estimate(options.value_lam)
    return advantages, returns


def distinct_share(rollout: Rollout) -> Array:
    """`[]` float32 in [1 / B, 1]: distinct responses, as a share of all B.

    Responses are compared by a 32-bit hash: of 1,000 distinct ones, two have the same
    hash with a probability of about 1e-4.
    """
    mask = rollout.mask
    tokens = jnp.where(mask, rollout.responses + 1, 0).astype(jnp.uint32)
    # A polynomial in an odd base, modulo 2³².
    powers = jnp.cumprod(jnp.full(mask.shape[1:], 2654435761, jnp.uint32))
    hashes = jnp.sum(tokens * powers[None], axis=1, dtype=jnp.uint32)
    hashes = jnp.sort(hashes)
    changes = jnp.sum(hashes[1:] != hashes[:-1])
    return (1 + changes).astype(jnp.float32) / mask.shape[0]


def rollout_metrics(
    scored: ScoredRollout, rewards: Array, *, kl_coef: Scalar, kl: KLOptions
) -> dict[str, Array]:
    """Scalar float32 metrics of responses, their scores and their KL."""
    rollout, mask = scored.rollout, scored.rollout.mask
    metrics = {
        "reward/score_mean": jnp.mean(scored.scores),
        "reward/score_std": jnp.std(scored.scores),
        "reward/shaped_mean": jnp.mean(jnp.sum(rewards, axis=1)),
        "response/length_mean": jnp.mean(rollout.lengths.astype(jnp.float32)),
        "response/stop_rate": 1.0 - jnp.mean(rollout.truncated.astype(jnp.float32)),
        "response/distinct": distinct_share(rollout),
    }
    if scored.ref_logprobs is not None:
        log_ratio = jnp.where(mask, scored.logprobs - scored.ref_logprobs, 0.0)
        metrics["kl/sequence"] = jnp.mean(jnp.sum(log_ratio, axis=1))
        metrics["kl/token"] = masked_mean(log_ratio, mask)
    if kl.place != "none":
        metrics["kl/coef"] = jnp.asarray(kl_coef, jnp.float32)
    return metrics

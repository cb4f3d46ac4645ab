"""Metrics are what they are called, over the whole batch; and experience as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import given
from properties.pure_functions import experience_of
from properties.strategies import CHECK, TOLERANCE, B, T, batches, ragged_masks

from rlhf_jax.algo.diagnostics import explained_variance
from rlhf_jax.algo.losses import ppo_loss
from rlhf_jax.algo.options import AdvantageOptions
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.rollout import make_experience

KL_COEF, GAMMA, LAM = 0.25, 0.9, 0.8


@jax.jit
def reported(x):
    loss, metrics = ppo_loss(
        x["logprobs"], x["values"], experience_of(x), entropy=x["entropy"]
    )
    return loss, metrics, explained_variance(x["values"], x["returns"], x["mask"])


@given(batch=batches())
@CHECK
def test_metrics_of_the_losses(batch):
    _, metrics, explained = reported(batch)
    mask = batch["mask"]
    x = {k: v[mask].astype(np.float64) for k, v in batch.items() if v.shape == (B, T)}
    log_ratio = x["logprobs"] - x["old_logprobs"]
    ratio, gap = np.exp(log_ratio), x["values"] - x["returns"]
    wanted = np.where(x["advantages"] > 0, ratio > 1.2, ratio < 0.8)
    bound = x["old_values"] + np.clip(x["values"] - x["old_values"], -0.2, 0.2)
    clipped = np.clip(ratio, 0.8, 1.2)
    terms = {
        "policy_loss": -np.minimum(ratio * x["advantages"], clipped * x["advantages"]),
        "value_loss": np.maximum(gap**2, (bound - x["returns"]) ** 2) / 2,
        "entropy": x["entropy"],
        "approx_kl": ratio - 1 - log_ratio,
        "clip_fraction": wanted,
        "value_clip_fraction": np.abs(bound - x["returns"]) > np.abs(gap),
        "ratio_mean": ratio,
    }
    assert set(metrics) == set(terms)
    for name, term in terms.items():
        want = term.mean() if len(term) else 0.0
        np.testing.assert_allclose(metrics[name], want, **TOLERANCE, err_msg=name)
    variance = np.var(x["returns"]) if mask.any() else 0.0
    want = 1 - np.var(gap) / variance if variance > 0 else 0.0
    np.testing.assert_allclose(explained, want, rtol=1e-4, atol=1e-4)


@jax.jit
def experiences(x):
    """As by default, without whitening, and bootstrapped where answers were cut."""
    rollout = Rollout(
        prompts=Prompts(
            tokens=jnp.zeros((B, 2), jnp.int32), lengths=jnp.ones(B, jnp.int32)
        ),
        responses=jnp.zeros((B, T), jnp.int32),
        lengths=jnp.sum(x["mask"], axis=1, dtype=jnp.int32),
        truncated=x["truncated"],
        logprobs=x["sampler_logprobs"],
    )
    scored = ScoredRollout(
        rollout=rollout,
        logprobs=x["logprobs"],
        ref_logprobs=x["ref_logprobs"],
        values=x["values"],
        scores=x["scores"],
        end_values=x["end_values"],
    )
    options = AdvantageOptions(gamma=GAMMA, lam=LAM)
    raw = dataclasses.replace(options, whiten="none")
    cut = dataclasses.replace(raw, bootstrap_truncated=True)
    return [
        make_experience(scored, kl_coef=KL_COEF, advantages=advantages)
        for advantages in (options, raw, cut)
    ]


@given(batch=batches(masks=ragged_masks()))
@CHECK
def test_metrics_of_the_experience(batch):
    (experience, metrics), *_ = experiences(batch)
    mask, lengths = batch["mask"], batch["mask"].sum(axis=1)
    log_ratio = batch["logprobs"].astype(np.float64) - batch["ref_logprobs"]
    log_ratio, scores = np.where(mask, log_ratio, 0), batch["scores"]
    returns = np.asarray(experience.returns)[mask].astype(np.float64)
    want = {
        "reward/score_mean": scores.mean(),
        "reward/score_std": scores.std(),
        "kl/coef": KL_COEF,
        "kl/sequence": log_ratio.sum(axis=1).mean(),
        "kl/token": log_ratio[mask].mean(),
        "value/mean": batch["values"][mask].mean(),
        "value/return_mean": returns.mean(),
        "response/length_mean": lengths.mean(),
        "response/stop_rate": (~batch["truncated"]).mean(),
        # The KL that is logged is the KL that was paid: an answer's rewards add up to
        # its score minus β times it. An empty answer is paid nothing.
        "reward/shaped_mean": np.where(lengths > 0, scores, 0).mean()
        - KL_COEF * log_ratio.sum(axis=1).mean(),
    }
    explained = metrics.pop("value/explained_variance")
    if np.var(returns) > 1e-3:  # where rounding does not rule the quotient
        unexplained = np.var(returns - batch["values"][mask])
        want["value/explained_variance"] = 1 - unexplained / np.var(returns)
        metrics["value/explained_variance"] = explained
    assert 0 < metrics.pop("response/distinct") <= 1
    assert set(metrics) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(
            metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )


@given(batch=batches(masks=ragged_masks()))
@CHECK
def test_whitening_moves_advantages_and_never_returns(batch):
    (whitened, _), (raw, _), _ = experiences(batch)
    np.testing.assert_array_equal(whitened.returns, raw.returns)
    mask = batch["mask"]
    returns = np.where(mask, raw.advantages + batch["values"], 0)
    np.testing.assert_allclose(raw.returns, returns, **TOLERANCE)
    real = np.asarray(raw.advantages)[mask].astype(np.float64)
    if real.std() > 0.1:  # where rounding is far from it
        np.testing.assert_allclose(
            np.asarray(whitened.advantages)[mask],
            oracles.whiten(real, ddof=0),
            rtol=1e-4,
            atol=1e-4,
        )


@given(batch=batches(masks=ragged_masks()))
@CHECK
def test_answers_that_were_cut_off_are_worth_their_end_and_no_score(batch):
    _, (plain, _), (cut, _) = experiences(batch)
    mask, lengths = batch["mask"], batch["mask"].sum(axis=1)
    # γ·V(s_T) stands where the score was paid.
    gain = GAMMA * batch["end_values"] - batch["scores"]
    worth = np.where(batch["truncated"], gain, 0.0)[:, None]
    tokens_after = np.maximum(lengths[:, None] - 1 - np.arange(T), 0)
    want = np.where(mask, worth * (GAMMA * LAM) ** tokens_after, 0)
    for name in ("advantages", "returns"):
        np.testing.assert_allclose(
            getattr(cut, name), getattr(plain, name) + want, **TOLERANCE
        )
    kept = ~batch["truncated"]
    np.testing.assert_array_equal(cut.returns[kept], plain.returns[kept])

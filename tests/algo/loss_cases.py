"""Cases of losses and of their diagnostics: see `function_cases`."""

from functools import partial

import numpy as np
from algo.function_calls import (
    ELEMENTWISE,
    WHITENS,
    Case,
    actor,
    critic,
    of,
    plain,
    ppo,
    surrogate,
)
from algo.function_inputs import ppo_totals, token_total, totals, value_totals

import rlhf_jax as rj

SAMPLER = "old_logprobs logprobs mask"
RANKED = "tokens are ranked over the whole batch"
ACTOR = "logprobs entropy old_logprobs advantages mask"
KL = "weights kl_coef ref_logprobs"
CRITIC = "values old_values returns value_mask mask old_logprobs advantages"
EPS = {"clip_eps": 0.1, "clip_eps_high": 0.3}
RATIO = {"dual_clip": 1.5, "log_ratio_clamp": 1.5}

LOSSES = {
    "clipped_policy_loss": surrogate(rj.clipped_policy_loss, EPS),
    "clipped_policy_loss, bounds": surrogate(rj.clipped_policy_loss, EPS | RATIO),
    "clipped_value_loss": plain(
        rj.clipped_value_loss,
        "values old_values returns",
        1,
        {"clip_eps": 0.3},
        padding=ELEMENTWISE,
    ),
    "reinforce_loss": surrogate(rj.reinforce_loss),
    "gspo_loss": surrogate(rj.gspo_loss, EPS),
    "gmpo_loss": surrogate(rj.gmpo_loss, EPS),
    "cispo_loss": surrogate(rj.cispo_loss, {"bound": 1.5, "lower_bound": 0.1}),
    "sapo_loss": surrogate(rj.sapo_loss, {"tau_positive": 1.5, "tau_negative": 2.5}),
    "clip_cov_loss": surrogate(
        partial(rj.clip_cov_loss, cov_range=(np.float64(0.1), np.float64(5.0))),
        {"fraction": 0.5} | EPS,
        keyed=True,
        parts=RANKED,
    ),
    "kl_cov_loss": surrogate(
        rj.kl_cov_loss, {"fraction": 0.5, "kl_coef": 0.3}, parts=RANKED
    ),
    **{
        f"sampler_ratio, {level}": plain(
            partial(rj.sampler_ratio, level=level), SAMPLER, empty=1.0
        )
        for level in ("token", "sequence", "geometric")
    },
    **{
        f"sampler_weights, {level} {mode}": plain(
            partial(rj.sampler_weights, level=level, mode=mode),
            SAMPLER,
            0,
            {"bound": 1.5, "lower_bound": 0.2},
            empty=0.0,
        )
        for level, mode in (("token", "truncate"), ("sequence", "mask"))
    },
    "actor_loss": Case(
        partial(actor, kl=False),
        ACTOR,
        2,
        {"entropy_coef": 0.1} | EPS | RATIO,
        parts=totals,
        empty=0.0,
    ),
    "actor_loss, KL": Case(
        partial(actor, kl=True, importance_weighted_kl=True),
        f"{ACTOR} {KL}",
        2,
        {"entropy_coef": 0.1, "length": 4.0}
        | {"aggregation": "seq-mean-token-sum-norm"},
        parts=totals,
        empty=0.0,
    ),
    "actor_loss, GMPO": Case(
        partial(actor, kl=True, policy_loss_fn=rj.gmpo_loss),
        f"{ACTOR} {KL}",
        2,
        {"aggregation": "seq-mean-token-mean", "entropy_coef": 0.1},
        parts=totals,
        empty=0.0,
    ),
    "critic_loss": Case(
        critic, CRITIC, 1, {"value_clip_eps": 0.3}, parts=value_totals, empty=0.0
    ),
    "critic_loss, unclipped": Case(
        partial(critic, value_clip_eps=None, half=False),
        CRITIC,
        1,
        {"aggregation": "seq-mean-token-sum-norm", "length": 4.0},
        parts=value_totals,
        empty=0.0,
    ),
    "ppo_loss": Case(
        ppo,
        f"logprobs values entropy old_logprobs advantages mask {KL} "
        "old_values returns value_mask",
        3,
        {"value_coef": 0.5, "entropy_coef": 0.1, "value_clip_eps": 0.3} | EPS | RATIO,
        parts=ppo_totals,
        empty=0.0,
    ),
    "preference_loss": Case(
        of(rj.preference_loss, "scores", "other_scores", keywords=["margin"]),
        "scores other_scores margin",
        3,
        {"label_smoothing": 0.1},
    ),
    "plackett_luce_loss": Case(
        of(rj.plackett_luce_loss, "values", keywords=["mask"]),
        "values mask",
        1,
        empty=0.0,
    ),
    "pairwise_ranking_loss": Case(
        of(rj.pairwise_ranking_loss, "values", "rewards", keywords=["mask"]),
        "values rewards mask",
        1,
        {"label_smoothing": 0.1},
        empty=0.0,
    ),
    # Diagnostics
    "approx_kl": plain(
        rj.approx_kl, "logprobs old_logprobs mask", parts=token_total, empty=0.0
    ),
    "mean_ratio": plain(
        rj.mean_ratio, "logprobs old_logprobs mask", parts=token_total, empty=0.0
    ),
    "clip_fraction": plain(
        rj.clip_fraction,
        "logprobs old_logprobs advantages mask",
        0,
        EPS,
        parts=token_total,
        empty=0.0,
    ),
    "value_clip_fraction": plain(
        rj.value_clip_fraction,
        "values old_values returns mask",
        0,
        {"clip_eps": 0.3},
        parts=token_total,
        empty=0.0,
    ),
    "explained_variance": plain(
        rj.explained_variance, "values returns mask", parts=WHITENS, empty=0.0
    ),
}

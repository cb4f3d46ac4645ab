"""How to call every function that `rlhf_jax` exports, and what each of them promises.

`CASES` has one entry or more per function, those of losses and diagnostics from
`loss_cases.py`; `test_every_function.py` holds them all against the same checks. The
name of a case is the function's, or the function's, a comma and what is special about
the call.
"""

from functools import partial

import jax
from algo.function_calls import (
    ELEMENTWISE,
    WHITENS,
    Case,
    adapted,
    normalized,
    of,
    over_groups,
    plain,
    whole,
)
from algo.function_inputs import SHARDS, totals
from algo.loss_cases import LOSSES

import rlhf_jax as rj

# Functions of Python's numbers, or of nothing: there is no batch to call them on.
WITHOUT_ARRAYS = {
    "best_of_n_kl": "an int in, a float out",
    "init_score_moments": "nothing in; update_score_moments starts from it",
}

PER_TOKEN = "each token for itself: the caller masks what comes out"
OWN_DTYPE = "hands back what it got"
GROUP = {"ddof": 0, "eps": 0.1}
GAE = "rewards values mask"
PAIR = "logprobs ref_logprobs"
DRAW = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.05}


CASES = {
    # Tokens and their probabilities
    "sample_token": Case(
        lambda x, **o: rj.sample_token(jax.random.key(0), x["next_logits"], **o),
        "next_logits",
        1,
        DRAW,
        parts="one key: each part would draw the same numbers",
    ),
    "sample_token, greedy": Case(
        lambda x, **o: rj.sample_token(jax.random.key(0), x["next_logits"], **o),
        "next_logits",
        options={"temperature": 0.0},
    ),
    # −inf excludes: looked at as the probabilities that it stands for.
    "transform_logits": Case(
        lambda x, **o: jax.nn.softmax(rj.transform_logits(x["next_logits"], **o)),
        "next_logits",
        1,
        DRAW,
    ),
    "response_mask": plain(rj.response_mask, "tokens", 0, {"stop_ids": 2}),
    "last_token_index": plain(rj.last_token_index, "mask", empty=0),
    "include_end_state": plain(rj.include_end_state, "mask", empty=0),
    "before_response": Case(
        lambda x, **o: rj.before_response(x["outputs"], x["mask"].shape[1], **o),
        "outputs mask",
        1,
        dtype=OWN_DTYPE,
    ),
    "token_logprobs": plain(
        rj.token_logprobs, "logits tokens", 1, {"temperature": 0.7}, padding=PER_TOKEN
    ),
    "token_entropy": plain(
        rj.token_entropy, "logits", 1, {"temperature": 0.7}, padding=PER_TOKEN
    ),
    "fused_token_logprobs": plain(
        rj.fused_token_logprobs,
        "hidden unembedding tokens",
        2,
        {"temperature": 0.7, "softcap": 2.0, "chunk_size": 5},
        padding=PER_TOKEN,
        rounds="multiplies in the dtype of `hidden`",
        second="its own derivative leaves out tokens without a cotangent",
    ),
    "soft_cap": plain(
        rj.soft_cap, "logits", 1, {"cap": 2.0}, padding=PER_TOKEN, dtype=OWN_DTYPE
    ),
    # Reductions
    **{
        f"aggregate, {mode}": plain(
            rj.aggregate,
            "values mask",
            1,
            {"mode": mode} | options,
            parts=totals,
            empty=0.0,
        )
        for mode, options in (
            ("token-mean", {}),
            ("token-sum", {}),
            ("seq-mean-token-mean", {}),
            ("seq-mean-token-sum", {}),
            ("seq-mean-token-sum-norm", {"length": 4.0}),
        )
    },
    "masked_mean": plain(
        rj.masked_mean, "values mask", 1, parts="counts its own tokens", empty=0.0
    ),
    "masked_mean, rows": plain(
        rj.masked_mean, "values mask", 1, {"axis": 1}, empty=0.0
    ),
    "masked_whiten": plain(
        rj.masked_whiten, "values mask", 1, GROUP, parts=WHITENS, empty=0.0
    ),
    "masked_whiten, scale": plain(
        partial(rj.masked_whiten, center=False),
        "values mask",
        1,
        {"ddof": 1},
        parts=WHITENS,
        empty=0.0,
    ),
    "masked_whiten, shards": plain(
        rj.masked_whiten,
        "values mask",
        1,
        {"shards": SHARDS, "eps": 0.1},
        local={"shards": 1},
        one={"shards": 1},
        empty=0.0,
    ),
    # Scores, KL, rewards
    **{
        f"kl_estimate, {name}": plain(
            rj.kl_estimate, PAIR, 2, options, padding=ELEMENTWISE
        )
        for name, options in {
            "k1": {"estimator": "k1"},
            "k2": {"estimator": "k2", "log_ratio_clamp": 1.5},
            "k3": {"estimator": "k3", "clamp": 2.0},
            "abs": {"estimator": "abs"},
            "k3+": {"estimator": "k3", "straight_through": True},
        }.items()
    },
    "adapt_kl_coef": Case(
        adapted,
        "kl_coef observed_kl",
        2,
        {"target_kl": 6.0, "horizon": 10.0, "num_episodes": 4},
    ),
    "penalize_missing_eos": plain(
        rj.penalize_missing_eos, "scores truncated", 1, {"penalty": 0.3}
    ),
    "penalize_missing_eos, replace": plain(
        partial(rj.penalize_missing_eos, mode="replace"),
        "scores truncated",
        1,
        {"penalty": -1.0},
    ),
    "penalize_missing_eos, scale": plain(
        partial(rj.penalize_missing_eos, mode="scale"),
        "scores truncated",
        1,
        {"penalty": 0.5},
    ),
    "soft_overlong_penalty": plain(
        rj.soft_overlong_penalty, "lengths", 0, {"limit": 4, "buffer": 3}
    ),
    "update_score_moments": Case(
        lambda x: rj.update_score_moments(rj.init_score_moments(), x["scores"]),
        "scores",
        parts="merges moments, which do not add up",
    ),
    "normalize_scores": Case(normalized, "scores", 1, {"eps": 0.1}),
    **{
        f"combine_scores, {how}": Case(
            lambda x, **o: rj.combine_scores(x["samples"].T, **o),
            "samples",
            options={"how": how, "penalty": 0.5},
        )
        for how in ("mean", "worst", "mean-minus-std")
    },
    "shape_rewards": plain(
        rj.shape_rewards,
        "scores logprobs ref_logprobs mask",
        0,
        {"kl_coef": 0.3, "estimator": "k3", "clamp": 2.0, "log_ratio_clamp": 1.5},
        empty=0.0,
    ),
    "shape_rewards, per row": Case(
        of(
            partial(rj.shape_rewards, score_position="after_last_token"),
            *("scores", "logprobs", "ref_logprobs", "mask"),
            keywords=["kl_coef"],
        ),
        "scores logprobs ref_logprobs mask kl_coef",
        empty=0.0,
    ),
    # Advantages
    "gae": plain(rj.gae, GAE, 0, {"gamma": 0.9, "lam": 0.5}, empty=0.0),
    "gae, associative": plain(
        partial(rj.gae, method="associative"), GAE, 0, {"gamma": 0.9}, empty=0.0
    ),
    "gae, all options": Case(
        lambda x, *, alpha, **o: rj.gae(
            *(x[k] for k in ("rewards", "values", "mask")),
            target_values=x["target_values"],
            end_values=x["end_values"],
            lam=rj.length_adaptive_lam(x["mask"], alpha=alpha),
            gaps="zero",
            **o,
        ),
        GAE + " target_values end_values",
        options={"gamma": 0.9, "alpha": 0.7},
        empty=0.0,
    ),
    "length_adaptive_lam": plain(
        rj.length_adaptive_lam, "mask", 0, {"alpha": 0.7}, empty=0.0
    ),
    "td_errors": plain(rj.td_errors, GAE, 0, {"gamma": 0.9}, empty=0.0),
    "n_step_returns": plain(
        rj.n_step_returns, GAE, 0, {"n": 2, "gamma": 0.9}, empty=0.0
    ),
    "rewards_to_go": plain(
        rj.rewards_to_go, "rewards mask", 0, {"gamma": 0.9}, empty=0.0
    ),
    "group_advantages, std": over_groups(rj.group_advantages, scale="std", **GROUP),
    "group_advantages, batch-std": whole(
        over_groups(rj.group_advantages, scale="batch-std", **GROUP), WHITENS
    ),
    "group_advantages, leave-one-out": over_groups(
        rj.group_advantages, scale="none", baseline="leave-one-out"
    ),
    "group_advantages, ids": over_groups(
        rj.group_advantages, ids=True, scale="std", **GROUP
    ),
    "broadcast_over_tokens": plain(rj.broadcast_over_tokens, "scores mask", empty=0.0),
    "reinforce_plus_plus_advantages": plain(
        rj.reinforce_plus_plus_advantages,
        "rewards mask",
        0,
        {"gamma": 0.9, "ddof": 1},
        parts=WHITENS,
        empty=0.0,
    ),
    "reinforce_plus_plus_baseline_advantages": Case(
        lambda x, *, groups, **o: rj.reinforce_plus_plus_baseline_advantages(
            x["scores"], groups, x["mask"], **o
        ),
        "scores mask",
        options={"groups": 2, "ddof": 1},
        one={"groups": 1},
        parts=WHITENS,
        empty=0.0,
    ),
    "remax_advantages": plain(rj.remax_advantages, "scores other_scores"),
    "opo_advantages": Case(
        lambda x, **o: rj.opo_advantages(x["scores"], x["lengths"], **o),
        "scores lengths",
        options={"groups": 2},
        one={"groups": 1},
    ),
    "gpg_advantages": whole(
        over_groups(rj.gpg_advantages, scale="std", **GROUP),
        "counts the groups with a signal in the whole batch",
    ),
    "pass_at_k_advantages": over_groups(rj.pass_at_k_advantages, scale="std", **GROUP),
    "pass_at_k_advantages, ids": over_groups(rj.pass_at_k_advantages, ids=True),
    # Minibatches and samples
    "split_minibatches": Case(
        lambda x, **o: rj.split_minibatches(
            jax.random.key(0), {k: x[k] for k in ("scores", "samples")}, **o
        ),
        "scores samples",
        2,
        {"num_minibatches": 2},
        one={"num_minibatches": 1},
        parts="one key: each part would draw the same order",
        dtype=OWN_DTYPE,
        drawn_bits=True,
    ),
    "best_of_n_mean": plain(rj.best_of_n_mean, "samples samples", 0, {"n": 2}),
    "pass_at_k": plain(rj.pass_at_k, "lengths", 0, {"num_samples": 3, "k": 2}),
} | LOSSES

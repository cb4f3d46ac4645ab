"""Every function over masked tokens, as a function of a drawn batch.

One compiled program computes them all: `evaluate(batch)` is a dict of their results by
name, with gradients where there are any. Results are `[B, T]`, `[B]` or `[]`.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.algo import advantages, diagnostics, losses, masking, policy_losses
from rlhf_jax.algo import reinforce as critic_free
from rlhf_jax.algo.off_policy import sampler_weights
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.types import Experience


def experience_of(x, **fields):
    """The frozen part of a batch. No network reads it, so it has no tokens."""
    return Experience(
        mask=x["mask"],
        old_logprobs=x["old_logprobs"],
        ref_logprobs=x["ref_logprobs"],
        old_values=x["old_values"],
        advantages=x["advantages"],
        returns=x["returns"],
        **fields,
    )


def gae(x, **options):
    return advantages.gae(x["rewards"], x["values"], x["mask"], **options)


def shaped(x, **options):
    names = ("scores", "logprobs", "ref_logprobs", "mask")
    return shape_rewards(*(x[name] for name in names), kl_coef=0.3, **options)


def actor(x, *, weighted=False, **options):
    fields = {}
    if weighted:
        fields = {"weights": x["weights"], "kl_coef": x["kl_coef"]}
    experience = experience_of(x, **fields)

    def loss(logprobs, entropy):
        return losses.actor_loss(logprobs, experience, entropy=entropy, **options)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        x["logprobs"], x["entropy"]
    )


def critic(x, **options):
    def loss(values):
        return losses.critic_loss(values, experience_of(x), **options)

    return jax.value_and_grad(loss, has_aux=True)(x["values"])


def policy_terms(x, loss_fn):
    def total(logprobs):
        terms = loss_fn(logprobs, x["old_logprobs"], x["advantages"], x["mask"])
        return jnp.sum(terms), terms

    return jax.grad(total, has_aux=True)(x["logprobs"])


FUNCTIONS = {
    "gae": lambda x: gae(x, gamma=0.9),
    "gae, associative": lambda x: gae(x, gamma=0.9, method="associative"),
    "gae, zero-filled gaps": lambda x: gae(x, gamma=0.9, gaps="zero"),
    "gae, all options": lambda x: gae(
        x,
        gamma=0.9,
        lam=advantages.length_adaptive_lam(x["mask"], alpha=0.5),
        target_values=x["target_values"],
        end_values=x["end_values"],
    ),
    "td_errors": lambda x: advantages.td_errors(x["rewards"], x["values"], x["mask"]),
    "n_step_returns": lambda x: advantages.n_step_returns(
        x["rewards"], x["values"], x["mask"], n=2, gamma=0.9
    ),
    "rewards_to_go": lambda x: critic_free.rewards_to_go(x["rewards"], x["mask"]),
    "reinforce_plus_plus": lambda x: critic_free.reinforce_plus_plus_advantages(
        x["rewards"], x["mask"], ddof=1
    ),
    "shape_rewards": lambda x: shaped(x),
    "shape_rewards, clamped k3": lambda x: shaped(
        x, estimator="k3", log_ratio_clamp=1.0, clamp=0.5
    ),
    "sampler_weights": lambda x: sampler_weights(
        x["old_logprobs"], x["sampler_logprobs"], x["mask"], lower_bound=0.5
    ),
    "sampler_weights, by sequence": lambda x: sampler_weights(
        x["old_logprobs"], x["sampler_logprobs"], x["mask"], level="sequence"
    ),
    "sampler_weights, by geometric mean": lambda x: sampler_weights(
        x["old_logprobs"],
        x["sampler_logprobs"],
        x["mask"],
        mode="mask",
        level="geometric",
        bound=2.0,
        lower_bound=0.0,
    ),
    "masked_mean": lambda x: masking.masked_mean(x["values"], x["mask"]),
    "masked_mean, by row": lambda x: masking.masked_mean(
        x["values"], x["mask"], axis=1
    ),
    "masked_whiten": lambda x: masking.masked_whiten(x["values"], x["mask"]),
    "masked_whiten, scale alone": lambda x: masking.masked_whiten(
        x["values"], x["mask"], center=False, ddof=1
    ),
    "explained_variance": lambda x: diagnostics.explained_variance(
        x["values"], x["returns"], x["mask"]
    ),
    "actor_loss": lambda x: actor(x, entropy_coef=0.1),
    "actor_loss, all options": lambda x: actor(
        x,
        weighted=True,
        clip_eps=0.1,
        clip_eps_high=0.3,
        dual_clip=3.0,
        log_ratio_clamp=1.5,
        entropy_coef=0.1,
        aggregation="seq-mean-token-mean",
    ),
    "actor_loss, sums of sequences": lambda x: actor(
        x, aggregation="seq-mean-token-sum"
    ),
    "critic_loss": lambda x: critic(x),
    "critic_loss, unclipped": lambda x: critic(
        x, value_clip_eps=None, half=False, aggregation="seq-mean-token-mean"
    ),
    "clipped_policy_loss": lambda x: policy_terms(x, policy_losses.clipped_policy_loss),
    "gspo_loss": lambda x: policy_terms(x, policy_losses.gspo_loss),
    "gmpo_loss": lambda x: policy_terms(x, policy_losses.gmpo_loss),
    "cispo_loss": lambda x: policy_terms(x, policy_losses.cispo_loss),
    "sapo_loss": lambda x: policy_terms(x, policy_losses.sapo_loss),
}


@jax.jit
def _evaluate(batch):
    return {name: fn(batch) for name, fn in FUNCTIONS.items()}


def evaluate(batch):
    """The results of all functions, as NumPy arrays."""
    return jax.device_get(_evaluate(batch))

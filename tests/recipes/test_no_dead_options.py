"""Every option of PPO changes what is learned: flip it, and the parameters differ.

Two updates of a bare actor and critic through the recipe's own programs. The sampler
is given slightly other numbers than the trainer, as another engine would have, so that
the source of the old log-probabilities matters. An option without a case here fails
`test_every_option_has_a_case`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import (
    context_logits,
    context_params,
    context_values,
    left_padded,
)

from rlhf_jax.algo.score_moments import update_score_moments
from rlhf_jax.algo.types import Prompts
from rlhf_jax.learner import (
    ActorCritic,
    init_train_state,
    separate_networks,
)
from rlhf_jax.models.callables import Policy
from rlhf_jax.presets import PPOMethod
from rlhf_jax.recipes.configs import PPOConfig
from rlhf_jax.recipes.four_models import FourModels
from rlhf_jax.recipes.ppo_programs import make_optimizers, make_programs, ppo_step
from rlhf_jax.rollout import (
    token_logprobs_from_logits,
    uncached_decoding,
    values_from_sequence,
)

V, T, B = 8, 4, 8
STOP = 3
FIXED = {
    "run_dir": "unused",
    "policy": "unused",
    "reward_model": "unused",
    "data": "unused",
    "batch_size": B,
    "max_new_tokens": T,
    "updates": 2,
}
QUICK = {
    "microbatches": 1,
    "minibatches": 2,
    "epochs": 2,
    "actor_optimizer.learning_rate": 0.05,
    "critic_optimizer.learning_rate": 0.05,
}

# Option: the value it is flipped to, and what else has to be so for it to matter.
LOSS_KL = {"kl.place": "loss", "kl.estimator": "k3", "kl.coef": 0.5}
TARGET = {"kl.target": 0.5, "kl.horizon": 40}
AFTER_LAST = {"scores.position": "after_last_token"}
REPLACE = {"scores.missing_eos": "replace", "scores.missing_eos_penalty": -1.0}
RECOMPUTED = {"old_logprobs": "recomputed"}
CORRECTED = RECOMPUTED | {"policy_loss.sampler_correction": "truncate"}
CASES = {
    "temperature": (0.7, {}),
    "after_stop": ("keep", {}),
    "old_logprobs": ("recomputed", {}),
    "kl.place": ("loss", {"kl.estimator": "k2"}),
    "kl.coef": (0.5, {}),
    "kl.estimator": ("k3", {}),
    "kl.straight_through": (True, LOSS_KL),
    "kl.log_ratio_clamp": (0.01, {}),
    "kl.clamp": (0.01, {}),
    "kl.target": (5.0, TARGET),
    "kl.unit": ("token-mean", TARGET),
    "kl.horizon": (400, TARGET),
    "scores.normalization": ("running", {}),
    "scores.clip": (0.5, {}),
    "scores.missing_eos": ("mask", {}),
    "scores.missing_eos_penalty": (-2.0, REPLACE),
    "scores.overlong_buffer": (2, {}),
    "scores.overlong_penalty": (3.0, {"scores.overlong_buffer": 2}),
    "scores.position": ("after_last_token", {}),
    "scores.end_value": ("zero", AFTER_LAST),
    "scores.whiten_rewards": (True, {}),
    "advantages.gamma": (0.9, {}),
    "advantages.lam": (0.5, {}),
    "advantages.value_lam": (0.5, {}),
    "advantages.lam_alpha": (1.0, {}),
    "advantages.n_steps": (2, {}),
    "advantages.bootstrap_truncated": (True, {}),
    "advantages.slow_critic_decay": (0.5, {}),
    "advantages.whiten": ("minibatch", {}),
    "advantages.whiten_shards": (
        4,
        {"advantages.whiten": "shard", "advantages.whiten_shards": 2},
    ),
    "advantages.center": (False, {}),
    "advantages.ddof": (1, {}),
    "policy_loss.clip_eps": (0.05, {}),
    "policy_loss.clip_eps_high": (0.05, {}),
    "policy_loss.dual_clip": (1.01, {"policy_loss.clip_eps": 0.5}),
    "policy_loss.log_ratio_clamp": (0.01, {}),
    "policy_loss.aggregation": ("seq-mean-token-mean", {}),
    "policy_loss.mean_of_means": (True, {"microbatches": 2}),
    "policy_loss.entropy_coef": (0.1, {}),
    "policy_loss.sampler_correction": ("truncate", RECOMPUTED),
    "policy_loss.sampler_level": ("sequence", CORRECTED),
    "policy_loss.sampler_bound": (1.0, CORRECTED),
    "policy_loss.sampler_lower_bound": (0.95, CORRECTED),
    "value_loss.clip_eps": (None, {}),
    "value_loss.coef": (0.1, {"critic_optimizer.max_grad_norm": 0.1}),
    "value_loss.half": (
        False,
        {"critic_optimizer.eps": 0.1, "critic_optimizer.max_grad_norm": 0.0},
    ),
    "epochs": (3, {}),
    "minibatches": (4, {}),
    "max_update_kl": (1e-9, {}),
    "critic_warmup": (1, {}),
}
OPTIMIZER_CASES = {
    "learning_rate": (0.01, {}),
    "schedule": ("constant", {}),
    "warmup_fraction": (0.5, {}),
    "end_fraction": (0.5, {}),
    "b1": (0.5, {}),
    "b2": (0.5, {}),
    "eps": (0.1, {}),
    "form": ("tf1", {}),
    "weight_decay": (0.5, {}),
    "decay": ("all", {"weight_decay": 0.5}),
    "max_grad_norm": (0.01, {"eps": 0.1}),
}
CASES |= {
    f"{who}_optimizer.{name}": (
        value,
        {f"{who}_optimizer.{key}": needed for key, needed in needs.items()},
    )
    for who in ("actor", "critic")
    for name, (value, needs) in OPTIMIZER_CASES.items()
}
WHERE_MODELS_ARE_LOADED = {"critic_trunk", "critic_head_std"}  # in test_presets_run.py


def options_of(cls, prefix=""):
    """Names of all leaves, dotted."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from options_of(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def configured(changes):
    """The configuration with dotted options replaced, checked."""
    config = PPOConfig(**FIXED)
    for option, value in changes.items():
        config = replaced(config, option.split("."), value)
    config.validate()
    return config


def replaced(options, path, value):
    name, *rest = path
    if rest:
        value = replaced(vars(options)[name], rest, value)
    return dataclasses.replace(options, **{name: value})


def logits(params, tokens, mask):
    """`context_logits` with a bias, which is no matrix."""
    return context_logits(params, tokens, mask) + params["bias"][None, None]


def networks(seed):
    """Parameters of the actor and the critic."""
    actor, critic = context_params(jax.random.key(seed), vocab_size=V, width=4)
    return actor | {"bias": 0.1 * jnp.arange(V)}, critic


def other_engine(params, tokens, mask):
    """The policy as a sampler with other kernels would compute it."""
    return 1.2 * logits(params, tokens, mask)


def score(_, tokens, mask):
    """`[B]`: an even token is worth 1, an odd one −½; all columns that are read."""
    worth = jnp.where(tokens % 2 == 0, 1.0, -0.5) * (1.0 + 0.1 * tokens)
    return jnp.sum(jnp.where(mask, worth, 0.0), axis=1)


@functools.cache
def models_and_prompts():
    prefill, decode = uncached_decoding(other_engine)
    token_logprobs = token_logprobs_from_logits(logits)
    values_fn = values_from_sequence(context_values)
    reference, _ = networks(1)
    models = FourModels(
        module=None,
        policy=Policy(token_logprobs, prefill, decode),
        forward=separate_networks(
            token_logprobs_fn=token_logprobs, values_fn=values_fn
        ),
        values_fn=values_fn,
        score_fn=score,
        reference=reference,
        reward=None,
        shares_trunk=False,
    )
    tokens, lengths = left_padded([[x] * (1 + x % 2) for x in range(B)], width=2)
    return models, Prompts(tokens=tokens, lengths=lengths)


@functools.cache
def learned(changes):
    """Parameters after two updates, as one vector; `changes` is a tuple of pairs."""
    config = configured(dict(changes))
    models, prompts = models_and_prompts()
    if config.kl.place == "none":
        models = dataclasses.replace(models, reference=None)
    optimizers, _ = make_optimizers(config)
    actor, critic = networks(0)
    state = init_train_state(
        jax.random.key(5),
        ActorCritic(actor=actor, critic=critic),
        optimizers,
        kl_coef=config.kl.coef,
        slow_critic=config.advantages.slow_critic_decay is not None,
    )
    moments = update_score_moments(state.score_moments, jnp.array([0.0, 3.0]))
    state = dataclasses.replace(state, score_moments=moments)
    programs = make_programs(config, models, optimizers, stop_ids=(STOP,), pad_id=0)
    for _ in range(config.updates):
        state, carried, _ = ppo_step(state, prompts, models, programs)
        state = dataclasses.replace(state, **carried)
    leaves = jax.tree.leaves(state.params)
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.mark.parametrize("option", CASES)
def test_the_option_changes_what_is_learned(option):
    value, needs = CASES[option]
    before = QUICK | needs
    plain = learned(tuple(before.items()))
    flipped = learned(tuple((before | {option: value}).items()))
    assert np.isfinite(flipped).all()
    # Larger than the rounding of another program, which is about 1e-7.
    assert np.abs(flipped - plain).max() > 1e-5, option


def test_the_same_options_learn_the_same():
    plain = tuple(QUICK.items())
    once = learned(plain)
    learned.cache_clear()
    np.testing.assert_array_equal(learned(plain), once)


def test_every_option_has_a_case():
    assert set(options_of(PPOMethod)) == set(CASES) | WHERE_MODELS_ARE_LOADED


@pytest.mark.parametrize(
    ("option", "value"),
    [("kl.place", "none"), ("scores.normalization", "reference")],
)
def test_further_values_of_an_option(option, value):
    plain = learned(tuple(QUICK.items()))
    assert np.abs(learned((*QUICK.items(), (option, value))) - plain).max() > 1e-5

"""Every option of PPO changes what is learned: flip it, and the parameters differ.

Two updates of a bare actor and critic through the recipe's own programs. An option
without a case here fails `test_every_option_has_a_case`.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import context_params, context_values, left_padded
from option_flips import (
    POLICY,
    POLICY_LOSS_CASES,
    SIZES,
    STOP,
    B,
    V,
    actor_params,
    as_vector,
    configured,
    optimizer_cases,
    options_of,
    reference_params,
    score,
)
from stub_runs import StubRun

from rlhf_jax.algo.scores import update_score_moments
from rlhf_jax.algo.types import Prompts
from rlhf_jax.config.ppo import PPOConfig, PPOMethod
from rlhf_jax.learner import ActorCritic, init_train_state, separate_networks
from rlhf_jax.recipes import ppo
from rlhf_jax.recipes.optimizers import make_ppo_optimizers
from rlhf_jax.recipes.policy_models import FourModels
from rlhf_jax.recipes.prompt_batches import PromptBatch
from rlhf_jax.rollout import values_from_sequence
from rlhf_jax.run.devices import make_mesh

QUICK = {
    "microbatches": 1,
    "minibatches": 1,
    "epochs": 1,
    "actor_optimizer.learning_rate": 0.2,
    "critic_optimizer.learning_rate": 0.2,
}

# For what makes a difference only from the second step on one experience on.
STEPS = {"minibatches": 2}
LOSS_KL = {"kl.place": "loss", "kl.estimator": "k3", "kl.coef": 0.5}
# Between the KL of a token and that of an answer.
TARGET = {"kl.target": 1.7, "kl.horizon": 40}
AFTER_LAST = {"scores.position": "after_last_token"}
# Adam forgets the scale of gradients that are far above its ε.
SEES_SCALE = {"critic_optimizer.eps": 0.1, "critic_optimizer.max_grad_norm": 0.0}
REPLACE = {"scores.missing_eos": "replace", "scores.missing_eos_penalty": -1.0}
CASES = {
    "temperature": (0.7, {}),
    "after_stop": ("keep", {}),
    "old_logprobs": ("recomputed", {}),
    "kl.place": ("loss", {"kl.estimator": "k2"}),
    "kl.coef": (0.5, {}),
    "kl.estimator": ("k3", {}),
    "kl.straight_through": (True, LOSS_KL),
    "kl.importance_weighted": (True, LOSS_KL),
    "kl.log_ratio_clamp": (0.01, {}),
    "kl.clamp": (0.01, {}),
    "kl.target": (100.0, TARGET),
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
    "advantages.whiten": ("minibatch", STEPS),
    "advantages.whiten_shards": (
        4,
        {"advantages.whiten": "shard", "advantages.whiten_shards": 2},
    ),
    "advantages.center": (False, {}),
    "advantages.ddof": (1, {}),
    "value_loss.clip_eps": (None, STEPS),
    "value_loss.coef": (0.1, SEES_SCALE),
    "value_loss.half": (False, SEES_SCALE),
    "epochs": (2, {}),
    "minibatches": (2, {}),
    "max_update_kl": (1e-9, STEPS),
    "critic_warmup": (1, {}),
}
CASES |= POLICY_LOSS_CASES
CASES |= optimizer_cases("actor_optimizer") | optimizer_cases("critic_optimizer")
WHERE_MODELS_ARE_LOADED = {"critic_trunk", "critic_head_std"}  # in test_presets_run.py


@functools.cache
def models_and_prompts():
    values_fn = values_from_sequence(context_values)
    models = FourModels(
        module=None,
        policy=POLICY,
        score_fn=score,
        reference=reference_params(),
        reward=None,
        forward=separate_networks(
            token_logprobs_fn=POLICY.token_logprobs, values_fn=values_fn
        ),
        values_fn=values_fn,
        shares_trunk=False,
    )
    tokens, lengths = left_padded([[x % V] * (1 + x % 2) for x in range(B)], width=2)
    return models, Prompts(tokens=tokens, lengths=lengths)


@functools.cache
def learned(changes):
    """Parameters after two updates, as one vector; `changes` is a tuple of pairs."""
    config = configured(PPOConfig(**SIZES), dict(changes))
    models, prompts = models_and_prompts()
    if config.kl.place == "none":
        models = dataclasses.replace(models, reference=None)
    optimizers, schedules = make_ppo_optimizers(config)
    _, critic = context_params(jax.random.key(0), vocab_size=V, width=4)
    state = init_train_state(
        jax.random.key(5),
        ActorCritic(actor=actor_params(0), critic=critic),
        optimizers,
        kl_coef=config.kl.coef,
        slow_critic=config.advantages.slow_critic_decay is not None,
    )
    moments = update_score_moments(state.score_moments, jnp.array([0.0, 3.0]))
    setup = ppo.PPOSetup(
        config=config,
        models=models,
        state=dataclasses.replace(state, score_moments=moments),
        schedules=schedules,
        programs=ppo.make_programs(
            config, models, optimizers, stop_ids=(STOP,), pad_id=0
        ),
        eval_key=jax.random.key(1),
        moments_key=jax.random.key(2),
    )

    def score_of(rollout):
        scores, _ = setup.programs.score(models.reward, rollout)
        return scores

    batch = PromptBatch(prompts=prompts, rows=[])
    data = SimpleNamespace(batches=lambda **_: [batch] * config.updates)
    # Operation by operation: compiling would take several times as long as two updates.
    with jax.disable_jit():
        run = StubRun(config.updates, score_of)
        state = ppo.train(setup, run, data, make_mesh())
    return as_vector(state.params)


@pytest.mark.parametrize("option", CASES)
def test_the_option_changes_what_is_learned(option):
    value, needs = CASES[option]
    before = QUICK | needs
    plain = learned(tuple(before.items()))
    flipped = learned(tuple((before | {option: value}).items()))
    assert np.isfinite(flipped).all()
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

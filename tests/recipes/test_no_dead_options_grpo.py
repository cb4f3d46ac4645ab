"""Every option of GRPO changes what is learned: flip it, and the parameters differ.

As `test_no_dead_options.py`, without a critic. One of the prompts earns the same
whatever the answer, so that its group has no signal.
"""

import dataclasses
import functools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from option_flips import (
    CORRECTED,
    POLICY,
    POLICY_LOSS_CASES,
    SIZES,
    STOP,
    actor_params,
    as_vector,
    configured,
    optimizer_cases,
    options_of,
    reference_params,
    score,
)
from stub_runs import StubRun

from rlhf_jax.algo.options import GroupOptions, PolicyLossOptions
from rlhf_jax.algo.types import Prompts
from rlhf_jax.config.grpo import GRPOConfig, GRPOMethod
from rlhf_jax.data.text_data import PromptRow
from rlhf_jax.learner import ActorCritic, init_train_state
from rlhf_jax.recipes import grpo
from rlhf_jax.recipes.optimizers import make_grpo_optimizers
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch
from rlhf_jax.run.devices import make_mesh

UNANSWERABLE = 0
QUICK = {
    "group_size": 4,
    "microbatches": 1,
    "minibatches": 1,
    "optimizer.learning_rate": 0.2,
}

STRONG = {"kl.coef": 0.5}
IN_LOSS = {"kl.place": "loss", "kl.estimator": "k2"}
# Between the KL of a token and that of an answer.
TARGET = STRONG | {"kl.target": 1.7, "kl.horizon": 40}
REPLACE = {"scores.missing_eos": "replace", "scores.missing_eos_penalty": -1.0}
UNSCALED = {"groups.scale": "none"}
ALONE = UNSCALED | {"groups.baseline": "none"}
CASES = {
    "temperature": (0.7, {}),
    "group_size": (2, {}),
    "groups.baseline": ("length-weighted", UNSCALED),
    "groups.scale": ("std", IN_LOSS),
    "groups.gamma": (0.5, ALONE),
    # An epsilon of Adam that does not forget the scale.
    "groups.ddof": (0, IN_LOSS | {"groups.scale": "std", "optimizer.eps": 0.1}),
    "resample": (1, {}),
    "refresh_every": (2, {}),
    "old_logprobs": ("recomputed", {}),
    "kl.place": ("loss", STRONG | {"kl.estimator": "k2"}),
    "kl.coef": (0.5, {}),
    "kl.estimator": ("k3", STRONG),
    "kl.straight_through": (True, STRONG | IN_LOSS | {"kl.estimator": "k3"}),
    "kl.importance_weighted": (True, STRONG | IN_LOSS),
    "kl.log_ratio_clamp": (0.01, STRONG),
    "kl.clamp": (0.01, STRONG),
    "kl.target": (100.0, TARGET),
    "kl.unit": ("token-mean", TARGET),
    "kl.horizon": (400, TARGET),
    "scores.clip": (0.5, {}),
    "scores.missing_eos": ("mask", {}),
    "scores.missing_eos_penalty": (-2.0, REPLACE),
    "scores.overlong_buffer": (2, {}),
    "scores.overlong_penalty": (3.0, {"scores.overlong_buffer": 2}),
    "epochs": (2, {}),
    "minibatches": (2, {}),
    "max_update_kl": (1e-9, {"minibatches": 2}),
}
CASES |= POLICY_LOSS_CASES | optimizer_cases("optimizer")
REFUSED = {  # options of scores that have no meaning without a critic
    "scores.normalization": "running",
    "scores.position": "after_last_token",
    "scores.end_value": "zero",
    "scores.whiten_rewards": True,
}


@functools.cache
def models():
    return PolicyModels(
        module=None,
        policy=POLICY,
        score_fn=score,
        reference=reference_params(),
        reward=None,
    )


def prompts_of(config, step, number):
    """Prompts of one token, others in every round of sampling."""
    count = config.batch_size // config.group_size
    first = np.arange(count, dtype=np.int32)[:, None]
    tokens = first + UNANSWERABLE if number == 0 else first + 4
    return PromptBatch(
        prompts=Prompts(tokens=tokens, lengths=np.ones(count, np.int32)),
        rows=[PromptRow(prompt=str(token), columns={}) for token in tokens[:, 0]],
    )


def score_of(rollout):
    scores = score(None, rollout.tokens, rollout.sequence_mask)
    unanswerable = rollout.prompts.tokens[:, -1] == UNANSWERABLE
    return jnp.where(unanswerable, 1.0, scores)


@functools.cache
def learned(changes):
    """Parameters after two updates, as one vector; `changes` is a tuple of pairs."""
    config = configured(GRPOConfig(**SIZES), dict(changes))
    called = models()
    if config.kl.place == "none":
        called = dataclasses.replace(called, reference=None)
    optimizers, schedules = make_grpo_optimizers(config)
    state = init_train_state(
        jax.random.key(5),
        ActorCritic(actor=actor_params(0), critic={}),
        optimizers,
        kl_coef=config.kl.coef,
        old_policy=config.refresh_every > 1,
    )
    setup = grpo.GRPOSetup(
        config=config,
        models=called,
        state=state,
        schedules=schedules,
        programs=grpo.make_programs(
            config, called, optimizers, stop_ids=(STOP,), pad_id=0
        ),
        eval_key=jax.random.key(1),
    )
    # Operation by operation: compiling would take five times as long as two updates.
    with jax.disable_jit():
        run = StubRun(config.updates, score_of)
        batches = functools.partial(prompts_of, config)
        state = grpo.train(setup, run, batches, make_mesh())
    return as_vector(state.params)


def assert_differ(option, value, needs):
    before = QUICK | needs
    plain = learned(tuple(before.items()))
    flipped = learned(tuple((before | {option: value}).items()))
    assert np.isfinite(flipped).all()
    assert np.abs(flipped - plain).max() > 1e-5, option


@pytest.mark.parametrize("option", CASES)
def test_the_option_changes_what_is_learned(option):
    assert_differ(option, *CASES[option])


@pytest.mark.parametrize("option", REFUSED)
def test_what_only_a_critic_gives_a_meaning_is_refused(option):
    flag = option.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag}="):
        configured(GRPOConfig(**SIZES), {option: REFUSED[option]})


def test_every_option_has_a_case():
    assert set(options_of(GRPOMethod)) == CASES.keys() | REFUSED.keys()
    assert not CASES.keys() & REFUSED.keys()


def test_the_same_options_learn_the_same():
    plain = tuple(QUICK.items())
    once = learned(plain)
    learned.cache_clear()
    np.testing.assert_array_equal(learned(plain), once)


def choices(cls, field):
    return get_args(get_type_hints(cls)[field])


def test_no_two_choices_of_an_option_learn_the_same():
    # Far enough to be clipped, and by steps that the scale of a gradient changes.
    steps = {"learning_rate": 4.0, "eps": 0.1, "max_grad_norm": 0.0}
    fine = QUICK | {f"optimizer.{name}": value for name, value in steps.items()}
    # With 4 × 4 answers G/(G − 1) of RLOO is also 1 over the share with a signal.
    fine |= {"group_size": 8, "minibatches": 2} | IN_LOSS
    variants = [{"kl.place": "none", "kl.coef": 0.05, "kl.estimator": "k1"}]
    variants += [
        {"groups.baseline": x} | UNSCALED for x in choices(GroupOptions, "baseline")
    ]
    variants += [
        {"groups.baseline": "mean", "groups.scale": x}
        for x in choices(GroupOptions, "scale")
        if x != "none"
    ]
    variants += [
        {"policy_loss.surrogate": x}
        for x in choices(PolicyLossOptions, "surrogate")
        if x not in ("ppo", "reinforce")
    ]
    variants += [{"policy_loss.surrogate": "reinforce", "minibatches": 1}]
    variants += [
        {"policy_loss.sampler_level": x} | CORRECTED
        for x in choices(PolicyLossOptions, "sampler_level")
    ]
    found = [learned(tuple((fine | variant).items())) for variant in variants]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.abs(one - other).max() > 1e-3, variants[i]

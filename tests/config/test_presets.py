"""Each preset against its transcription: the same numbers from independent code.

The transcriptions are float64 loops over tokens, written from the originals; see
`transcriptions.py`. A "network" here is a table: the actor holds the new
log-probabilities and the critic the new values, so that gradients in the parameters
are those in log-probabilities and values.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config import transcriptions
from config.transcription_parts import random_batch

from rlhf_jax import adapt_kl_coef
from rlhf_jax.algo.types import Prompts, Rollout, ScoredRollout
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.learner import ActorCritic, count_experience, ppo_objective
from rlhf_jax.learner.gradients import accumulate_gradients
from rlhf_jax.rollout import make_experience
from rlhf_jax.rollout.experience import token_rewards, whiten_minibatch

SEEDS = range(5)
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
"""Twice the usual: whitening divides a float32 sum of squares."""


def table_forward(params, tokens, mask, /, *, response_length, temperature):
    """Rows of the tables, by the id that stands in the prompt."""
    row = tokens[:, 0]
    logprobs = params.actor[row]
    return logprobs, jnp.zeros_like(logprobs), params.critic[row]


def scored_rollout(batch, *, method, garbage):
    """The batch as the library's record; padding that nobody may read is garbage."""
    size, width = batch.old_logprobs.shape
    lengths = batch.lengths
    if method.after_stop == "keep":  # every column is trained on
        lengths = np.full(size, width)
    columns = np.arange(width)[None, :]
    is_token = columns < lengths[:, None]
    is_state = columns <= lengths[:, None]
    array = lambda x, real: jnp.asarray(np.where(real, x, garbage), jnp.float32)  # noqa: E731
    return ScoredRollout(
        rollout=Rollout(
            prompts=Prompts(
                tokens=jnp.arange(size, dtype=jnp.int32)[:, None],
                lengths=jnp.ones(size, jnp.int32),
            ),
            responses=jnp.zeros((size, width), jnp.int32),
            lengths=jnp.asarray(lengths, jnp.int32),
            truncated=jnp.asarray(batch.truncated),
            logprobs=array(batch.old_logprobs, is_token),
        ),
        logprobs=array(batch.old_logprobs, is_token),
        ref_logprobs=None
        if method.kl.place == "none"
        else array(batch.ref_logprobs, is_token),
        values=array(batch.old_values, is_state),
        scores=jnp.asarray(batch.scores, jnp.float32),
    )


def by_the_library(batch, method, *, garbage=np.nan, microbatches=1):
    """The quantities of `Numbers`, by name."""
    # The transcription takes scores as they are: normalising belongs to the run.
    method = dataclasses.replace(
        method, scores=dataclasses.replace(method.scores, normalization="none")
    )
    scored = scored_rollout(batch, method=method, garbage=garbage)
    shaping = {"kl_coef": batch.kl_coef, "kl": method.kl, "scores": method.scores}
    experience, metrics = make_experience(
        scored,
        advantages=method.advantages,
        policy_loss=method.policy_loss,
        **shaping,
    )
    if method.advantages.whiten == "minibatch":
        experience = whiten_minibatch(experience, method.advantages)
    params = ActorCritic(
        actor=jnp.asarray(batch.new_logprobs, jnp.float32),
        critic=jnp.asarray(batch.new_values, jnp.float32),
    )
    objective = ppo_objective(
        table_forward,
        policy_loss=method.policy_loss,
        value_loss=method.value_loss,
        kl=method.kl,
        num_microbatches=microbatches,
    )
    # The library takes every n-th row into a microbatch, the originals neighbours.
    order = np.arange(len(batch.scores)).reshape(microbatches, -1).T.ravel()
    _, losses, gradients = accumulate_gradients(
        objective,
        params,
        jax.tree.map(lambda x: x[order], experience),
        count_experience(experience),
        num_microbatches=microbatches,
    )
    kl_coef = batch.kl_coef
    if method.kl.target is not None:
        kl_coef = adapt_kl_coef(
            kl_coef,
            metrics["kl/sequence"],
            target_kl=method.kl.target,
            horizon=method.kl.horizon,
            num_episodes=len(batch.scores),
        )
    return {
        "rewards": token_rewards(scored, **shaping),
        "advantages": experience.advantages,
        "returns": experience.returns,
        "policy_loss": losses["policy/loss"],
        "value_loss": losses["value/loss"],
        "logprob_gradient": gradients.actor,
        "value_gradient": gradients.critic,
        "next_kl_coef": kl_coef,
    }


def without_kl_of_the_pad_token(batch):
    """DeepSpeed-Chat pays the KL of the first pad token too; here it is made 0."""
    ref_logprobs = batch.ref_logprobs.copy()
    for row, length in enumerate(batch.lengths):
        ref_logprobs[row, length:] = batch.old_logprobs[row, length:]
    return dataclasses.replace(batch, ref_logprobs=ref_logprobs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PPO_PRESETS)
def test_a_preset_is_its_original(name, seed):
    batch = random_batch(seed)
    if name == "deepspeed_chat":
        batch = without_kl_of_the_pad_token(batch)
    want = vars(getattr(transcriptions, f"transcribe_{name}")(batch))
    got = by_the_library(batch, PPO_PRESETS[name]())
    assert set(got) == set(want)
    for quantity, value in got.items():
        close(value, want[quantity], err_msg=f"{name}: {quantity}")


@pytest.mark.parametrize("microbatches", [2, 3, 6])
@pytest.mark.parametrize("name", ["nplus_tldr", "trl"])
def test_the_mean_of_means(name, microbatches):
    batch = random_batch(7)
    transcribe = getattr(transcriptions, f"transcribe_{name}")
    want = vars(transcribe(batch, microbatches=microbatches))
    got = by_the_library(batch, PPO_PRESETS[name](), microbatches=microbatches)
    for quantity, value in got.items():
        close(value, want[quantity], err_msg=f"{name}: {quantity}")
    whole = transcribe(batch)
    assert abs(want["policy_loss"] - whole.policy_loss) > 1e-3


@pytest.mark.parametrize("name", PPO_PRESETS)
def test_another_preset_is_not_the_original(name):
    """The comparison can fail: no two of the six agree on the gradients."""
    batch = without_kl_of_the_pad_token(random_batch(0))
    want = getattr(transcriptions, f"transcribe_{name}")(batch)
    for other in set(PPO_PRESETS) - {name}:
        got = by_the_library(batch, PPO_PRESETS[other]())
        differences = [
            np.abs(got["logprob_gradient"] - want.logprob_gradient).max(),
            np.abs(got["value_gradient"] - want.value_gradient).max(),
        ]
        assert max(differences) > 1e-3, other

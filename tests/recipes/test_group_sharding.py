"""Rows that replace others stay spread over the devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.types import Rollout
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.data.text_data import PromptRow
from rlhf_jax.learner import ActorCritic, init_train_state
from rlhf_jax.models.callables import Policy
from rlhf_jax.recipes.group_sampling import ScoredResponses
from rlhf_jax.recipes.grpo import make_programs
from rlhf_jax.recipes.optimizers import make_grpo_optimizers
from rlhf_jax.recipes.prompt_batches import collate
from rlhf_jax.run.devices import make_mesh, put_batch

N, G = 4, 2


def batch_of(round_number):
    """Prompts 10, 11, 12, 13 in the first round, 20 to 23 in the second…"""
    numbers = [10 * (round_number + 1) + i for i in range(N)]
    rows = [
        (PromptRow(f"p{n}", {"number": n}), np.array([n], np.int32)) for n in numbers
    ]
    return collate(rows, width=1, pad_id=0)


def built(*, resample, mesh=None):
    """Configuration, state and programs; no model is called, so there is none."""
    config = GRPOConfig(
        run_dir="unused",
        policy="unused",
        data="unused",
        reward=("unused.py:unused",),
        group_size=G,
        batch_size=N * G,
        resample=resample,
    )
    optimizers, _ = make_grpo_optimizers(config)
    state = init_train_state(
        jax.random.key(0),
        ActorCritic(actor={"w": jnp.zeros(2)}, critic={}),
        optimizers,
        kl_coef=0.0,
    )
    models = SimpleNamespace(policy=Policy(None, None, None), score_fn=None, lora=None)
    programs = make_programs(
        config, models, optimizers, stop_ids=(3,), pad_id=0, mesh=mesh
    )
    return config, state, programs


def answers_of(round_number, prompts):
    """N groups of G answers, which count on from 100, 200…"""
    first = 100 * (round_number + 1)
    answers = jnp.arange(first, first + N * G, dtype=jnp.int32)[:, None]
    return Rollout(
        prompts=jax.tree.map(jnp.asarray, prompts),
        responses=answers,
        lengths=jnp.ones(N * G, jnp.int32),
        truncated=jnp.zeros(N * G, bool),
        logprobs=-answers.astype(jnp.float32),
    )


def test_replaced_rows_stay_spread_over_the_devices():
    mesh = make_mesh(data=2)
    _, _, programs = built(resample=1, mesh=mesh)
    kept, drawn = (
        put_batch(
            mesh,
            ScoredResponses(
                rollout=answers_of(number, batch_of(number).repeat(G).prompts),
                scores=jnp.full(N * G, float(number)),
            ),
        )
        for number in (0, 1)
    )
    index = jnp.array([8, 9, 2, 3, 4, 5, 14, 15])
    got = programs.groups.replace(kept, drawn, index)
    assert got.scores.tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    want = [200, 201, 102, 103, 104, 105, 206, 207]
    assert got.rollout.responses[:, 0].tolist() == want
    for leaf in jax.tree.leaves(got):
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [4, 4]

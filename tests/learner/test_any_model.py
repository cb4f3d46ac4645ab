"""Models from outside, trained through the public functions alone.

One is a bare function of arrays, one a Flax NNX module. Both must learn to count: the
score of an answer is the share of its tokens that are one more than the token before.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_models import context_logits, context_params, context_values

from rlhf_jax.algo.types import Prompts
from rlhf_jax.learner import (
    ActorCritic,
    init_train_state,
    make_optimizer,
    make_update,
    ppo_objective,
    separate_networks,
    step_keys,
)
from rlhf_jax.learner.finite import pop_nonfinite
from rlhf_jax.rollout import (
    generate,
    make_experience,
    score_rollout,
    token_logprobs_from_logits,
    uncached_decoding,
    values_from_sequence,
)

V, P, T, B = 6, 2, 6, 64
UPDATES = 18


def counting_score(_, tokens, mask):
    follows = tokens[:, P:] == (tokens[:, P - 1 : -1] + 1) % V
    return jnp.mean(follows & mask[:, P:], axis=1)


def bare_function():
    actor, critic = context_params(jax.random.key(0), vocab_size=V, width=12, scale=0.3)
    return context_logits, context_values, actor, critic


def nnx_module():
    nnx = pytest.importorskip("flax.nnx", exc_type=ImportError)

    class Reader(nnx.Module):
        """One output vector per token, from the token and the text before it."""

        def __init__(self, outputs, *, rngs):
            self.embedding = nnx.Embed(V, 12, rngs=rngs)
            self.norm = nnx.LayerNorm(12, rngs=rngs)
            self.output = nnx.Linear(12, outputs, rngs=rngs)

        def __call__(self, tokens, mask):
            embedded = jnp.where(mask[..., None], self.embedding(tokens), 0.0)
            return self.output(self.norm(embedded + jnp.cumsum(embedded, 1) / 10))

    actor_graph, actor = nnx.split(Reader(V, rngs=nnx.Rngs(0)))
    critic_graph, critic = nnx.split(Reader(1, rngs=nnx.Rngs(1)))

    def logits(params, tokens, mask):
        return nnx.merge(actor_graph, params)(tokens, mask)

    def values(params, tokens, mask):
        return nnx.merge(critic_graph, params)(tokens, mask)[..., 0]

    return logits, values, actor, critic


@pytest.mark.parametrize("model", [bare_function, nnx_module])
def test_it_learns(model):
    logits, values, actor, critic = model()
    prefill, decode = uncached_decoding(logits)
    networks = {
        "token_logprobs_fn": token_logprobs_from_logits(logits),
        "values_fn": values_from_sequence(values),
    }
    optimizers = ActorCritic(actor=make_optimizer(0.03), critic=make_optimizer(0.03))
    reference = jax.tree.map(jnp.copy, actor)
    prompts = Prompts(
        tokens=jnp.arange(2 * B).reshape(B, P) % V, lengths=1 + jnp.arange(B) % P
    )

    @jax.jit
    def experience_of(state):
        rollout = generate(
            step_keys(state)[0],
            state.params.actor,
            prompts,
            prefill=prefill,
            decode=decode,
            max_new_tokens=T,
            stop_ids=(),
        )
        scored = score_rollout(
            state.params.actor,
            state.params.critic,
            reference,
            counting_score(None, rollout.tokens, rollout.sequence_mask),
            rollout,
            **networks,
        )
        return make_experience(scored, kl_coef=state.kl_coef)

    update = make_update(
        ppo_objective(separate_networks(**networks)),
        optimizers,
        num_epochs=4,
        num_minibatches=2,
    )
    state = init_train_state(
        jax.random.key(1),
        ActorCritic(actor=actor, critic=critic),
        optimizers,
        kl_coef=0.01,
    )
    history = []
    for step in range(UPDATES):
        experience, metrics = experience_of(state)
        state, updated = update(state, experience)
        pop_nonfinite(jax.device_get(updated), step=step)
        history.append(jax.device_get(metrics))

    scores = [float(metrics["reward/score_mean"]) for metrics in history]
    np.testing.assert_allclose(scores[0], 1 / V, atol=0.1)  # chance
    assert np.mean(scores[-3:]) > 0.9
    np.testing.assert_allclose(history[0]["kl/sequence"], 0.0, atol=1e-5)
    assert history[-1]["kl/sequence"] > 1  # it did move away from the reference

"""This library in `trl_parity.py`: the same updates from the same samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algo.kl import kl_estimate
from rlhf_jax.algo.masking import response_mask
from rlhf_jax.algo.rewards import shape_rewards
from rlhf_jax.algo.types import Array, Experience, Params, Prompts, Rollout
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.config.run import OptimizerConfig
from rlhf_jax.learner import (
    ActorCritic,
    TrainState,
    init_train_state,
    make_optimizer,
    make_schedule,
    make_update,
    ppo_objective,
    separate_networks,
)
from rlhf_jax.models import Head, load_pretrained
from rlhf_jax.models.callables import critic, policy, reward_model
from rlhf_jax.rollout import make_experience, score_rollout
from rlhf_jax.rollout.experience import final_scores

HEADS: dict[str, Head] = {
    "actor": "lm",
    "reference": "lm",
    "critic": "value",
    "reward": "reward",
}

TRAINED = ("actor", "critic")

METRICS = {
    "policy loss": "policy/loss",
    "value loss": "value/loss",
    "clip fraction": "policy/clip_fraction",
    "value clip fraction": "value/clip_fraction",
}


class Frozen(NamedTuple):
    """Parameters that no update changes."""

    reference: Params
    reward: Params


class JaxSide:
    """Four models as TRL saved them, and an update per `take_turn`."""

    def __init__(self, settings: dict[str, Any], method: PPOMethod):
        directory = Path(settings["directory"])
        modules, params = {}, {}
        for name, head in HEADS.items():
            path = directory / f"{name}-0"
            modules[name], params[name] = load_pretrained(path, head=head)
        self._settings = settings
        self._method = method
        self._token_logprobs = policy(modules["actor"]).token_logprobs
        self._values = critic(modules["critic"])
        self._score = reward_model(modules["reward"])
        self._frozen = Frozen(params["reference"], params["reward"])
        optimizer = make_staircase_optimizer(settings, method.actor_optimizer)
        optimizers = ActorCritic(actor=optimizer, critic=optimizer)
        self._state = init_train_state(
            jax.random.key(0),
            ActorCritic(actor=params["actor"], critic=params["critic"]),
            optimizers,
            kl_coef=method.kl.coef,
        )
        self._prepare = jax.jit(self._make_experience)
        self._approximate_kl = jax.jit(self._mean_squared_log_ratio)
        num_microbatches = settings["trainer"]["gradient_accumulation_steps"]
        # Of one minibatch, so that TRL's order can be followed: one optimizer step.
        self._update = make_update(
            ppo_objective(
                separate_networks(
                    token_logprobs_fn=self._token_logprobs, values_fn=self._values
                ),
                temperature=method.temperature,
                policy_loss=method.policy_loss,
                value_loss=method.value_loss,
                kl=method.kl,
                num_microbatches=num_microbatches,
            ),
            optimizers,
            num_epochs=1,
            num_minibatches=1,
            num_microbatches=num_microbatches,
        )

    def take_turn(self, recorded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An update on TRL's samples, in its order, by the names of the table.

        Args:
            recorded: `queries` [B, P], `responses` [B, T] and `steps`, the rows of each
                microbatch of each optimizer step.
        """
        rollout = self._make_rollout(recorded["queries"], recorded["responses"])
        experience, numbers = self._prepare(self._state, self._frozen, rollout)
        before = {name: flat(vars(self._state.params)[name]) for name in TRAINED}
        steps = [self._take_step(experience, rows) for rows in recorded["steps"]]
        after = {name: flat(vars(self._state.params)[name]) for name in TRAINED}
        return (
            {name: np.asarray(x) for name, x in numbers.items()}
            | {name: np.array([step[name] for step in steps]) for name in steps[0]}
            | {f"{name}, change": after[name] - before[name] for name in TRAINED}
        )

    def _make_rollout(self, queries: np.ndarray, responses: np.ndarray) -> Rollout:
        stop_id, pad_id = self._settings["stop_id"], self._settings["pad_id"]
        mask = response_mask(jnp.asarray(responses, jnp.int32), stop_ids=stop_id)
        return Rollout(
            prompts=Prompts(
                tokens=jnp.asarray(queries, jnp.int32),
                lengths=jnp.asarray((queries != pad_id).sum(axis=1), jnp.int32),
            ),
            responses=jnp.asarray(responses, jnp.int32),
            lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
            truncated=jnp.asarray(~(responses == stop_id).any(axis=1)),
            logprobs=jnp.full(responses.shape, jnp.nan),  # not read: recomputed
        )

    def _make_experience(
        self, state: TrainState, frozen: Frozen, rollout: Rollout
    ) -> tuple[Experience, dict[str, Array]]:
        method = self._method
        scored = score_rollout(
            state.params.actor,
            state.params.critic,
            frozen.reference,
            self._score(frozen.reward, rollout.tokens, rollout.sequence_mask),
            rollout,
            token_logprobs_fn=self._token_logprobs,
            values_fn=self._values,
            temperature=self._method.temperature,
        )
        experience, _ = make_experience(
            scored,
            kl_coef=state.kl_coef,
            kl=method.kl,
            scores=method.scores,
            advantages=method.advantages,
            policy_loss=method.policy_loss,
        )
        assert scored.ref_logprobs is not None and experience.ref_logprobs is not None
        assert experience.old_values is not None and experience.returns is not None
        scores = final_scores(scored.rollout, scored.scores, method.scores)
        rewards, kl = shape_rewards(  # which the experience does not keep
            scores,
            scored.logprobs,
            scored.ref_logprobs,
            experience.mask,
            kl_coef=state.kl_coef,
            estimator=method.kl.estimator,
            score_position=method.scores.position,
        )
        return experience, {
            "answer lengths": rollout.lengths,
            "scores, less the penalty": scores,
            "old log-probabilities": experience.old_logprobs,
            "reference log-probabilities": experience.ref_logprobs,
            "KL to the reference": kl,
            "values": experience.old_values,
            "shaped rewards": rewards,
            "advantages, whitened": experience.advantages,
            "returns": experience.returns,
        }

    def _take_step(self, experience: Experience, rows: np.ndarray) -> dict[str, Array]:
        """One optimizer step on microbatches of the given rows, `[N, B/N]`."""
        # Microbatch j of an update is rows j, j + N, j + 2N … of the minibatch.
        minibatch = jax.tree.map(lambda x: x[rows.T.ravel()], experience)
        divergence = self._approximate_kl(self._state.params.actor, minibatch)
        self._state, metrics = self._update(self._state, minibatch)
        found = {name: metrics[metric] for name, metric in METRICS.items()}
        return found | {"approximate KL": divergence}

    def _mean_squared_log_ratio(self, actor: Params, minibatch: Experience) -> Array:
        """TRL's approximate KL: k2, and a mean over padding too, where it is 0."""
        assert minibatch.tokens is not None and minibatch.sequence_mask is not None
        logprobs, _ = self._token_logprobs(
            actor,
            minibatch.tokens,
            minibatch.sequence_mask,
            response_length=minibatch.mask.shape[1],
            temperature=self._method.temperature,
        )
        k2 = kl_estimate(logprobs, minibatch.old_logprobs, estimator="k2")
        return jnp.mean(jnp.where(minibatch.mask, k2, 0.0))


def make_staircase_optimizer(
    settings: dict[str, Any], config: OptimizerConfig
) -> optax.GradientTransformation:
    """AdamW with a learning rate that changes only between updates, as in TRL."""
    schedule = make_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        total_steps=settings["total_updates"],
        end_fraction=config.end_fraction,
    )
    steps = settings["optimizer_steps"]
    return make_optimizer(
        lambda step: schedule(step // steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm or None,
    )


def flat(params: Params) -> np.ndarray:
    """All weights of a model in one vector, copied because updates donate buffers."""
    return np.concatenate([np.array(leaf).ravel() for leaf in jax.tree.leaves(params)])


def change_of_weights(directory: Path, model: str, update: int) -> np.ndarray:
    """The change of all weights of `"actor"` or `"critic"` by an update of TRL."""
    before, after = (
        flat(load_pretrained(directory / f"{model}-{n}", head=HEADS[model])[1])
        for n in (update - 1, update)
    )
    return after - before

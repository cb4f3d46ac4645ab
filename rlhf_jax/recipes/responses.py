"""Responses of a policy to prompts, and their metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from rlhf_jax.algo.types import Array, Params, Prompts, Rollout, record
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.models.callables import Policy
from rlhf_jax.rollout.decoding import generate
from rlhf_jax.run.devices import map_batches

Sampler = Callable[[Array, Params, Prompts], Rollout]


@record
class Responses:
    """One response to each of N prompts; host arrays."""

    tokens: np.ndarray  # [N, T] int32
    lengths: np.ndarray  # [N] int32, through the stop token
    truncated: np.ndarray  # [N] bool, no stop token before the limit
    scores: np.ndarray | None  # [N] float32, from the reward model, if any
    kl: np.ndarray | None  # [N] float32, Σ_t log π − log π_ref in nats, if measured

    def texts(self, tokenization: Tokenization) -> list[str]:
        """The responses, without special tokens."""
        return tokenization.decode(self.tokens, self.lengths)

    def metrics(self) -> dict[str, float]:
        """Means over the responses."""
        metrics = {
            "length_mean": float(np.mean(self.lengths)),
            "stop_rate": 1.0 - float(np.mean(self.truncated)),
        }
        if self.scores is not None:
            metrics["score_mean"] = float(np.mean(self.scores))
            metrics["score_std"] = float(np.std(self.scores))
        if self.kl is not None:
            metrics["kl_sequence"] = float(np.mean(self.kl))
        return metrics


def make_sampler(
    policy: Policy, *, sharding: Sharding | None = None, **options: Any
) -> Sampler:
    """`sample(key, params, prompts) -> Rollout`, compiled.

    Args:
        policy: callables of the language model.
        sharding: of the rollout; None: chosen by the compiler.
        **options: keywords of `rlhf_jax.rollout.decoding.generate`.
    """
    return jax.jit(
        partial(generate, prefill=policy.prefill, decode=policy.decode, **options),
        out_shardings=sharding,
    )


class ResponseEvaluator:
    """Samples responses and computes their metrics; compiles once.

    Args:
        sample: samples the responses.
        policy: computes the reference's log-probabilities.
        score_fn: the reward model; None: no scores.
        temperature: sampling temperature; at 0 the KL to a reference is undefined and
            rejected.
        batch_size: prompts per batch.
        mesh: device mesh.
    """

    def __init__(
        self,
        sample: Sampler,
        *,
        policy: Policy,
        score_fn: ScoreFn | None,
        temperature: float,
        batch_size: int,
        mesh: Mesh,
    ):
        self._sample = sample
        self._batch_size = batch_size
        self._mesh = mesh

        def measure(reference: Params, reward: Params, rollout: Rollout):
            scores = kl = None
            if score_fn is not None:
                scores = score_fn(reward, rollout.tokens, rollout.sequence_mask)
            if reference is not None:
                ref_logprobs, _ = policy.token_logprobs(
                    reference,
                    rollout.tokens,
                    rollout.sequence_mask,
                    response_length=rollout.responses.shape[1],
                    temperature=temperature,
                )
                log_ratio = rollout.logprobs - ref_logprobs
                kl = jnp.sum(jnp.where(rollout.mask, log_ratio, 0.0), axis=1)
            return {
                "tokens": rollout.responses,
                "lengths": rollout.lengths,
                "truncated": rollout.truncated,
                "scores": scores,
                "kl": kl,
            }

        self._measure = jax.jit(measure)

    def answers(
        self,
        key: Array,
        params: Params,
        prompts: Prompts,
        *,
        reference: Params | None = None,
        reward: Params | None = None,
    ) -> Responses:
        """Responses to host prompts `[N, P]`; each batch has its own key."""

        def answer(number: int, batch: Prompts):
            batch_key = jax.random.fold_in(key, number)
            return self._measure(
                reference, reward, self._sample(batch_key, params, batch)
            )

        rows = map_batches(
            answer, prompts, batch_size=self._batch_size, mesh=self._mesh
        )
        return Responses(**rows)

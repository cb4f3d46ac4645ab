"""Samples responses to prompts: one prefill, then a decode loop."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algo.sampling import check_sampling, sample_token
from rlhf_jax.algo.types import Array, Params, Prompts, Rollout, Scalar, record
from rlhf_jax.interfaces import DecodeFn, PrefillFn


@record
class _Progress:
    """The carry of the decode loop."""

    step: Array  # [] int32, response tokens sampled so far
    token: Array  # [B] int32, the newest
    done: Array  # [B] bool, a stop token was sampled
    responses: Array  # [B, T] int32
    logprobs: Array  # [B, T] float32
    lengths: Array  # [B] int32
    cache: Any


def generate(
    key: Array,
    params: Params,
    prompts: Prompts,
    *,
    prefill: PrefillFn,
    decode: DecodeFn,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: Scalar = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    pad_id: int = 0,
) -> Rollout:
    """Samples one response per prompt.

    Stops as soon as every row has a stop token. Noise depends only on the key and the
    column, so a key gives the same text on any devices; use a new key for every
    rollout.

    Args:
        key: typed PRNG key, consumed.
        params: passed to `prefill` and `decode`.
        prompts: `[B, P]`, left-padded, each of at least one token.
        prefill: processes the prompts; see `rlhf_jax.interfaces`.
        decode: processes one token per row.
        max_new_tokens: T, at least 1.
        stop_ids: tokens that end a response, and are included in it. Empty: none.
        temperature: divides the logits; the number 0 (Python's or NumPy's) is greedy.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of tokens with this probability.
        min_p: keep tokens with at least this fraction of the largest probability.
        pad_id: written after the end of a response.

    Returns:
        Responses, their lengths, and the log-probability of each token under the
        sampling distribution (after temperature and truncation), 0 after the end.

    Raises:
        ValueError: if `max_new_tokens` is less than 1, or a sampling option given as a
            number is out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    pad = jnp.asarray(pad_id, jnp.int32)  # NumPy int64 would change the loop carry
    stops = jnp.asarray(tuple(stop_ids), jnp.int32)
    batch, prompt_length = prompts.tokens.shape

    def draw(step: Array, logits: Array) -> tuple[Array, Array]:
        return sample_token(
            jax.random.fold_in(key, step),
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )

    def write(progress: _Progress, logits: Array, cache: Any) -> _Progress:
        """Samples the next token of every unfinished row."""
        token, logprob = draw(progress.step, logits)
        token = jnp.where(progress.done, pad, token)
        logprob = jnp.where(progress.done, 0.0, logprob)
        put = jax.lax.dynamic_update_index_in_dim
        return _Progress(
            step=progress.step + 1,
            token=token,
            done=progress.done | (token[:, None] == stops[None, :]).any(axis=1),
            responses=put(progress.responses, token, progress.step, 1),
            logprobs=put(progress.logprobs, logprob, progress.step, 1),
            lengths=progress.lengths + (~progress.done).astype(jnp.int32),
            cache=cache,
        )

    def unfinished(progress: _Progress) -> Array:
        return (progress.step < max_new_tokens) & ~progress.done.all()

    def advance(progress: _Progress) -> _Progress:
        logits, cache = decode(params, progress.token, progress.cache)
        return write(progress, logits, cache)

    logits, cache = prefill(
        params,
        prompts.tokens,
        prompts.mask,
        # The last sampled token is never processed, so it needs no column.
        cache_length=prompt_length + max_new_tokens - 1,
    )
    start = _Progress(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        responses=jnp.full((batch, max_new_tokens), pad, jnp.int32),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        cache=cache,
    )
    end = jax.lax.while_loop(unfinished, advance, write(start, logits, cache))
    return Rollout(
        prompts=prompts,
        responses=end.responses,
        lengths=end.lengths,
        truncated=~end.done,
        logprobs=end.logprobs,
    )

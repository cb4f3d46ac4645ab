"""Prompts to sampled answers: one prefill, then a decode loop."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algo.sampling import check_sampling, sample_token
from rlhf_jax.algo.types import Array, Params, Prompts, Rollout, Scalar, record
from rlhf_jax.interfaces import DecodeFn, PrefillFn


@record
class _Progress:
    """What the decode loop carries."""

    step: Array  # [] int32, response tokens drawn so far
    token: Array  # [B] int32, the newest
    done: Array  # [B] bool, a stop token was drawn
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
    """Samples one answer per prompt.

    Stops as soon as every row has drawn a stop token. Noise depends on the key and the
    column alone, so that one key gives one text whatever the devices; draw a new key
    for every rollout.

    Args:
        key: typed PRNG key, consumed.
        params: handed to `prefill` and `decode`.
        prompts: `[B, P]`, left-padded, each of at least one token.
        prefill: reads the prompts; see `rlhf_jax.interfaces`.
        decode: reads one token per row.
        max_new_tokens: T, at least 1.
        stop_ids: tokens that end an answer; they belong to it. Empty: none does.
        temperature: divides the logits; the number 0 (Python's or NumPy's) takes the
            likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the fewest tokens that hold this probability.
        min_p: keep tokens at least this fraction as probable as the likeliest.
        pad_id: written after the end of an answer.

    Returns:
        Answers, their lengths, and the log-probability of each token under the
        distribution it was drawn from (after temperature and truncation), 0 past
        the end.

    Raises:
        ValueError: when `max_new_tokens` is less than 1, or an option of the sampling
            that is given as a number is out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    pad = jnp.asarray(pad_id, jnp.int32)  # NumPy's int64 would change the loop's carry
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
        """Draws the next token of every row that is not done."""
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
        # The last token drawn is never read, so it needs no column.
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

"""Log-probabilities and entropies of tokens, with or without materializing logits."""

from numbers import Real

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.temperature import SMALLEST_TO_LEARN, check_temperature
from rlhf_jax.algo.types import Array, Scalar


def before_response(x: Array, response_length: int) -> Array:
    """Model outputs just before each response token.

    The only shift from sequence to response positions. Column s of a model's output
    depends on tokens 0 … s, so response token t, at column S − T + t, was sampled from
    column S − T + t − 1.

    Args:
        x: `[B, S, ...]`, per-position outputs: hidden states, logits or values.
        response_length: T, the number of trailing columns that are response; at
            most S − 1.

    Returns:
        `[B, T, ...]`, columns S − T − 1 through S − 2.

    Raises:
        ValueError: if no column precedes the response.
    """
    sequence_length = x.shape[1]
    if not 0 < response_length < sequence_length:
        raise ValueError(
            f"response_length={response_length}: expected between 1 and "
            f"{sequence_length - 1}, for sequences of {sequence_length} tokens"
        )
    return x[:, sequence_length - response_length - 1 : sequence_length - 1]


def token_logprobs(logits: Array, tokens: Array, *, temperature: Scalar = 1.0) -> Array:
    """Log-probability of each token: z_y − logsumexp(z), with z = logits / temperature.

    Args:
        logits: `[B, T, V]` float; column t predicts `tokens[:, t]`. −inf excludes a
            token.
        tokens: `[B, T]` integer, in `[0, V)`.
        temperature: `[]`, positive, the sampler's. Unlike in `sample_token`, the number
            0 is rejected: greedy decoding has probability 1, which cannot be trained
            on. An array is not checked, and gives NaN at 0.

    Returns:
        `[B, T]` float32, differentiable in `logits`.

    Raises:
        ValueError: when a temperature given as a number is below 0.01 or not finite.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.
    """
    chex.assert_rank([logits, tokens], [3, 2])
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    chex.assert_type([logits, tokens], [float, int])
    scaled = logits.astype(jnp.float32) / _divisor(temperature)
    return _select_token(scaled, tokens) - jax.nn.logsumexp(scaled, axis=-1)


def token_entropy(logits: Array, *, temperature: Scalar = 1.0) -> Array:
    """Entropy of the distribution each token is drawn from, in nats.

    H = −Σ_v p_v · log p_v, with p = softmax(logits / temperature) and 0 · log 0 = 0.

    Args:
        logits: `[B, T, V]` float; −inf excludes a token.
        temperature: `[]`, positive, as in `token_logprobs`.

    Returns:
        `[B, T]` float32, in [0, log V], differentiable in `logits`.

    Raises:
        ValueError: when a temperature given as a number is below 0.01 or not finite.
        AssertionError: on a wrong rank or dtype.
    """
    chex.assert_rank(logits, 3)
    chex.assert_type(logits, float)
    scaled = logits.astype(jnp.float32) / _divisor(temperature)
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    # A finite replacement makes the gradient at an excluded token 0, not 0 · inf.
    finite = jnp.where(logprobs == -jnp.inf, 0.0, logprobs)
    return -jnp.sum(jnp.exp(logprobs) * finite, axis=-1)


def fused_token_logprobs(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    chunk_size: int = 1024,
) -> tuple[Array, Array]:
    """`token_logprobs` and `token_entropy` of `hidden @ unembedding` without the
    logits.

    Processes chunks of tokens against the full vocabulary and keeps one number per
    token; the backward pass recomputes the logits of each chunk. Products are computed
    in the dtype of `hidden` and accumulated in float32, and so is the gradient of
    `unembedding` over chunks.

    A chunk takes tokens from the whole batch, so that a sharded batch stays sharded;
    the vocabulary may be sharded as well. On a mesh with explicit axes and a sharded
    batch only the forward pass traces. A token whose results both have zero cotangents
    is excluded from the gradients, whatever its hidden state is.

    Args:
        hidden: `[B, T, D]` float; column t predicts `tokens[:, t]`.
        unembedding: `[D, V]` float.
        tokens: `[B, T]` integer, in `[0, V)`.
        temperature: `[]`, positive, as in `token_logprobs`. Gets no gradient.
        softcap: soft cap of the logits, before the temperature: see `soft_cap`.
        chunk_size: maximum tokens per chunk, over all devices. The logits of one chunk,
            `chunk_size · V` float32, are in memory.

    Returns:
        `(logprobs, entropy)`, each `[B, T]` float32, differentiable once, in reverse
        mode, in `hidden` and `unembedding`; their gradients have their dtypes. Forward
        mode (`jax.jvp`) raises. Second derivatives are unsupported but do not raise:
        they miss all tokens with zero cotangents. For either, use `token_logprobs` and
        `token_entropy`.

    Raises:
        ValueError: when `chunk_size` is not positive, or a temperature given as a
            number below 0.01 or not finite.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.
    """
    chex.assert_rank([hidden, unembedding, tokens], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    chex.assert_equal(hidden.shape[2], unembedding.shape[0])
    chex.assert_type([hidden, unembedding, tokens], [float, float, int])
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1 token")
    count = tokens.size
    num_chunks = -(-count // chunk_size)
    chunks = _into_chunks(hidden.reshape(count, -1), num_chunks)  # [C, N/C, D]
    token_chunks = _into_chunks(tokens.reshape(count), num_chunks)  # [C, N/C]
    temperature = jax.lax.stop_gradient(_divisor(temperature))
    # In `shard_map` weights are replicated but their gradient, a carry of the backward
    # pass, varies over devices. Adding a zero that varies like the tokens makes the
    # weights vary too, so that JAX sums their gradient over devices; it compiles to
    # nothing.
    for x in (hidden, tokens):
        unembedding = unembedding + jnp.zeros_like(x, unembedding.dtype, shape=())
    results = _fused(chunks, unembedding, token_chunks, temperature, softcap)
    logprobs, entropy = (x.T.reshape(-1)[:count].reshape(tokens.shape) for x in results)
    return logprobs, entropy


def soft_cap(logits: Array, cap: float | None) -> Array:
    """Soft-caps logits to (−cap, cap): cap · tanh(logits / cap); None: no cap.

    Args:
        logits: `[...]` float.
        cap: positive, or None.

    Returns:
        `[...]`, dtype of `logits`.

    Raises:
        ValueError: when the cap is not positive and finite.

    References:
        Gemma Team, 2024, arXiv:2408.00118, section 2.
    """
    if cap is None:
        return logits
    if isinstance(cap, Real):
        if not 0 < cap < float("inf"):
            raise ValueError(f"cap={cap}: expected a finite number above 0, or None")
        cap = float(cap)  # a NumPy float64 would change the dtype of the logits
    return cap * jnp.tanh(logits / cap)


def _divisor(temperature: Scalar) -> Array:
    """`[]` float32."""
    check_temperature(temperature, smallest=SMALLEST_TO_LEARN)
    temperature = jnp.asarray(temperature, jnp.float32)
    chex.assert_rank(temperature, 0)
    return temperature


def _fused_results(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    temperature: Array,
    softcap: float | None,
) -> tuple[Array, Array]:
    """`[C, N, D]`, `[D, V]`, `[C, N]`, `[]` → log-probabilities, entropies `[C, N]`."""
    return _fused_forward(hidden, unembedding, tokens, temperature, softcap)[0]


def _fused_forward(hidden, unembedding, tokens, temperature, softcap):
    def forward_chunk(_, chunk):
        hidden, tokens = chunk
        scaled = _chunk_logits(hidden, unembedding, softcap) / temperature
        normalizer = jax.nn.logsumexp(scaled, axis=-1)
        shifted = scaled - normalizer[:, None]
        entropy = -jnp.sum(jnp.exp(shifted) * shifted, axis=-1)
        return None, (_select_token(shifted, tokens), normalizer, entropy)

    _, results = _scan(forward_chunk, None, (hidden, tokens))
    logprobs, normalizer, entropy = results
    saved = (hidden, unembedding, tokens, temperature, normalizer, entropy)
    return (logprobs, entropy), saved


def _fused_backward(softcap, saved, cotangents):
    hidden, unembedding, tokens, temperature, normalizer, entropy = saved

    def backward_chunk(d_unembedding, chunk):
        hidden, tokens, normalizer, entropy, d_logprobs, d_entropy = chunk
        # 0 · NaN would propagate from the hidden state of padding to all weights.
        used = ((d_logprobs != 0) | (d_entropy != 0))[:, None]
        hidden = jnp.where(used, hidden, jnp.zeros_like(hidden))
        logits = _chunk_logits(hidden, unembedding, softcap)
        scaled = logits / temperature
        shifted = scaled - normalizer[:, None]
        probs = jnp.exp(shifted)
        # ∂ log p_y / ∂z = 1_y − p          ∂H / ∂z = −p · (log p + H)
        d_scaled = jnp.where(_is_token(scaled, tokens), d_logprobs[:, None], 0.0)
        d_scaled -= probs * (
            d_logprobs[:, None] + d_entropy[:, None] * (shifted + entropy[:, None])
        )
        d_logits = jnp.where(used, d_scaled / temperature, 0.0)
        if softcap is not None:  # d/dx c · tanh(x / c) = 1 − tanh²
            d_logits *= 1.0 - jnp.square(logits / softcap)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = _dot(d_logits, unembedding.astype(hidden.dtype), (1, 1))
        d_unembedding += _dot(hidden, d_logits, (0, 0))
        return d_unembedding, d_hidden.astype(hidden.dtype)

    d_unembedding, d_hidden = _scan(
        backward_chunk,
        jnp.zeros_like(unembedding, jnp.float32),
        (hidden, tokens, normalizer, entropy, *cotangents),
    )
    return d_hidden, d_unembedding.astype(unembedding.dtype), None, None


_fused = jax.custom_vjp(_fused_results, nondiff_argnums=(4,))
_fused.defvjp(_fused_forward, _fused_backward)


def _into_chunks(x: Array, num_chunks: int) -> Array:
    """`[N, ...]` → `[C, ⌈N/C⌉, ...]`, chunk c holding rows c, c + C, c + 2C, …

    `reshape(C, -1)` would put each chunk on a subset of the devices.
    """
    rows = -(-x.shape[0] // num_chunks)
    padding = rows * num_chunks - x.shape[0]
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(rows, num_chunks, *x.shape[1:]).swapaxes(0, 1)


def _scan(body, init, xs):
    """`lax.scan`, without a loop for a single chunk."""
    num_chunks = jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.scan(body, init, xs, unroll=num_chunks == 1)


def _chunk_logits(hidden: Array, unembedding: Array, softcap: float | None) -> Array:
    """`[N, D]`, `[D, V]` → `[N, V]` float32."""
    return soft_cap(_dot(hidden, unembedding.astype(hidden.dtype), (1, 0)), softcap)


def _dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Product of two matrices over one axis of each, accumulated in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _is_token(logits: Array, tokens: Array) -> Array:
    """`[..., V]` bool. Works on a sharded vocabulary, where `take_along_axis` fails."""
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return vocabulary == tokens[..., None].astype(jnp.int32)


def _select_token(logits: Array, tokens: Array) -> Array:
    return jnp.sum(jnp.where(_is_token(logits, tokens), logits, 0.0), axis=-1)

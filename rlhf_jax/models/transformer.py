"""One decoder-only transformer for the GPT-2 and the Llama family, in Flax Linen.

The parameters of all blocks are stacked on a leading layer axis, so that the same
checkpoint runs with the blocks unrolled (faster on CPU) or under `lax.scan` (compiles
in constant time). The residual stream is kept as `[B·S, D]`: matrix products over a
single leading axis have far faster weight gradients on CPU.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.algo.masking import last_token_index, select_index
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.attention import (
    KVCache,
    attend,
    causal_mask,
    positions_of,
    rotary_angles,
    rotate,
)
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.linear import Linear

Dtype = Any


class Block(nn.Module):
    """Attention and feed-forward part, each on a normalised residual stream."""

    config: DecoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: Array | None,
        visible: Array,
        past: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One block.

        Args:
            x: `[B·Q, D]`, the residual stream.
            angles: `[B, Q, H / 2]` rotary angles, or None.
            visible: `[B, Q, C]` bool.
            past: `(keys, values, end)`: two of `[B, K, C, H]`, and `[]` int32, the
                column where the new ones are written. None: attend over this call's
                own keys.

        Returns:
            The residual stream and `(keys, values)`, each `[B, K, C, H]`.
        """
        c = self.config
        batch, num_queries = visible.shape[:2]

        def heads_first(x: Array) -> Array:
            x = x.reshape(batch, num_queries, -1, c.head_dim)
            return x.swapaxes(1, 2)  # [B, N, Q, H]

        h = norm(c, self.dtype, self.param_dtype, "attention_norm")(x)
        queries = self.dense("query", c.num_heads * c.head_dim, c.attention_bias)(h)
        keys = self.dense("key", c.num_kv_heads * c.head_dim, c.attention_bias)(h)
        values = self.dense("value", c.num_kv_heads * c.head_dim, c.attention_bias)(h)
        queries, keys, values = map(heads_first, (queries, keys, values))
        if angles is not None:
            queries, keys = rotate(queries, angles), rotate(keys, angles)
        if past is not None:
            past_keys, past_values, end = past
            put = jax.lax.dynamic_update_slice_in_dim
            keys = put(past_keys, keys, end, axis=2)
            values = put(past_values, values, end, axis=2)
        mixed = attend(queries, keys, values, visible).swapaxes(1, 2)
        mixed = mixed.reshape(batch * num_queries, c.num_heads * c.head_dim)
        x = x + self.dense("output", c.width, c.projection_bias, residual=True)(mixed)

        h = norm(c, self.dtype, self.param_dtype, "mlp_norm")(x)
        if c.mlp == "swiglu":
            gate = self.dense("gate", c.mlp_width, c.projection_bias)(h)
            h = nn.silu(gate) * self.dense("up", c.mlp_width, c.projection_bias)(h)
        else:
            h = self.dense("up", c.mlp_width, c.projection_bias)(h)
            h = nn.gelu(h, approximate=True)
        x = x + self.dense("down", c.width, c.projection_bias, residual=True)(h)
        return x, (keys, values)

    def dense(self, name: str, features: int, bias: bool, *, residual: bool = False):
        """A projection; those that write to the residual stream start smaller."""
        stddev = self.config.initializer_range
        if residual:  # GPT-2: keeps the stream's variance independent of depth
            stddev /= (2 * self.config.num_layers) ** 0.5
        return Linear(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(stddev),
            name=name,
        )


def norm(config: DecoderConfig, dtype: Dtype, param_dtype: Dtype, name: str):
    """LayerNorm or RMSNorm; statistics in float32."""
    if config.norm == "rms":
        return nn.RMSNorm(
            epsilon=config.norm_eps, dtype=dtype, param_dtype=param_dtype, name=name
        )
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,  # E[x²] - E[x]² cancels in float32
        name=name,
    )


class Transformer(nn.Module):
    """A decoder with one of three heads.

    `module.apply({"params": params}, tokens, mask)` returns by head:

    * `"lm"`: logits `[B, S, V]`, column s predicting token s + 1;
    * `"value"`: values `[B, S]`, of the sequence read through token s;
    * `"reward"`: scores `[B]`, read at the last real token.

    All are float32.

    Attributes:
        config: the shape.
        head: which of the three.
        dtype: dtype of activations; softmax, norms and head outputs stay float32.
        param_dtype: dtype of parameters.
        scan_layers: run the blocks under `lax.scan` instead of unrolled.
        remat: recompute each block's activations in the backward pass.
    """

    config: DecoderConfig
    head: Head = "lm"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    def setup(self):
        """Declares the parameters."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        self.token_embedding = self.param(
            "token_embedding", init, (c.vocab_size, c.width), self.param_dtype
        )
        if c.positions == "learned":
            self.position_embedding = self.param(
                "position_embedding", init, (c.max_positions, c.width), self.param_dtype
            )
        self.block = Block(c, self.dtype, self.param_dtype, parent=None)
        self.layers = self.param("layers", self._init_layers)
        self.final_norm = norm(c, self.dtype, self.param_dtype, "final_norm")
        if self.head != "lm":
            # 1/√(D + 1): scores of a fresh head have a variance near one.
            head_init = nn.initializers.normal((c.width + 1) ** -0.5)
            self.score = self.param("score", head_init, (c.width,), self.param_dtype)
        elif not c.tie_embeddings:
            self.output_embedding = self.param(
                "output_embedding", init, (c.width, c.vocab_size), self.param_dtype
            )

    def _init_layers(self, key: Array) -> Params:
        """Parameters of every block, stacked: each leaf `[L, …]`."""
        c = self.config
        x = jnp.zeros((1, c.width), self.dtype)
        angles = jnp.zeros((1, 1, c.head_dim // 2)) if c.positions == "rotary" else None
        visible = jnp.ones((1, 1, 1), bool)

        def init_one(layer_key: Array) -> Params:
            return self.block.init(layer_key, x, angles, visible)["params"]

        return jax.vmap(init_one)(jax.random.split(key, c.num_layers))

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Head outputs; see the class.

        Args:
            tokens: `[B, S]` int32; ids under padding may be anything in range.
            mask: `[B, S]` bool, True on real tokens; padding on either side.
        """
        hidden = self.hidden(tokens, mask)
        if self.head == "lm":
            return _logits(hidden, self.unembedding().astype(self.dtype))
        values = self._score(hidden)
        if self.head == "value":
            return values
        return select_index(values, last_token_index(mask))

    def hidden(self, tokens: Array, mask: Array) -> Array:
        """Last hidden state after the final norm, `[B, S, D]`."""
        x, angles = self._embed(tokens, positions_of(mask))
        visible = causal_mask(mask)
        run = lambda params, x: self._block(params, x, angles, visible)[0]  # noqa: E731
        if self.remat:
            run = jax.checkpoint(run)
        if self.scan_layers:
            x, _ = jax.lax.scan(lambda x, p: (run(p, x), None), x, self.layers)
        else:
            for params in unstack(self.layers, self.config.num_layers):
                x = run(params, x)
        return self.final_norm(x).reshape(*tokens.shape, -1)

    def unembedding(self) -> Array:
        """`[D, V]`, the matrix that turns hidden states into logits."""
        if self.config.tie_embeddings:
            return self.token_embedding.T
        return self.output_embedding

    def prefill(
        self, tokens: Array, mask: Array, cache_length: int
    ) -> tuple[Array, KVCache]:
        """Reads left-padded prompts.

        Args:
            tokens: `[B, P]` int32.
            mask: `[B, P]` bool, True on real tokens, the last column all True.
            cache_length: columns of the cache, at least P plus the tokens to decode.

        Returns:
            Logits `[B, V]` for the first response token, and the cache.
        """
        x, angles = self._embed(tokens, positions_of(mask))
        visible = causal_mask(mask)
        layers = self._decoding_layers()
        keys, values = [], []
        room = (0, cache_length - tokens.shape[1])
        for params in layers:
            x, (k, v) = self._block(params, x, angles, visible)
            keys.append(jnp.pad(k, ((0, 0), (0, 0), room, (0, 0))))
            values.append(jnp.pad(v, ((0, 0), (0, 0), room, (0, 0))))
        last = self.final_norm(x.reshape(*tokens.shape, -1)[:, -1])
        cache = KVCache(
            keys=tuple(keys),
            values=tuple(values),
            mask=jnp.pad(mask, ((0, 0), room)),
            end=jnp.asarray(tokens.shape[1], jnp.int32),
            layers=layers,
            unembedding=self.unembedding().astype(self.dtype),
        )
        return _logits(last, cache.unembedding), cache

    def decode(self, tokens: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Reads one more token per row.

        Args:
            tokens: `[B]` int32.
            cache: with a free column.

        Returns:
            Logits `[B, V]` for the next token, and the cache with one more column.
        """
        position = jnp.sum(cache.mask, axis=1, keepdims=True, dtype=jnp.int32)
        columns = jnp.arange(cache.mask.shape[1])[None]
        mask = cache.mask | (columns == cache.end)
        x, angles = self._embed(tokens[:, None], position)
        keys, values = [], []
        for i, params in enumerate(cache.layers):
            past = (cache.keys[i], cache.values[i], cache.end)
            x, (k, v) = self._block(params, x, angles, mask[:, None], past)
            keys.append(k)
            values.append(v)
        cache = dataclasses.replace(
            cache,
            keys=tuple(keys),
            values=tuple(values),
            mask=mask,
            end=cache.end + 1,
        )
        return _logits(self.final_norm(x), cache.unembedding), cache

    def _decoding_layers(self) -> tuple[Params, ...]:
        """Parameters of each block, matrices cast as they will be used."""

        def cast(path: tuple, leaf: Array) -> Array:
            is_norm = any(str(key.key).endswith("norm") for key in path)
            # Beside a kernel of 8 bits, and dropout keys, lie numbers that stay.
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            keeps = is_norm or not is_float or path[-1].key == "kernel_scale"
            return leaf if keeps else leaf.astype(self.dtype)

        layers = jax.tree_util.tree_map_with_path(cast, self.layers)
        return tuple(unstack(layers, self.config.num_layers))

    def _block(self, params: Params, x: Array, *args) -> tuple[Array, Any]:
        return self.block.apply({"params": params}, x, *args)  # pyright: ignore

    def _embed(self, tokens: Array, positions: Array) -> tuple[Array, Array | None]:
        """`[B, S]` → residual stream `[B·S, D]` and rotary angles, if any."""
        x = self.token_embedding[tokens]
        if self.config.positions == "learned":
            x = x + self.position_embedding[positions]
            angles = None
        else:
            angles = rotary_angles(self.config, positions)
        return x.reshape(-1, self.config.width).astype(self.dtype), angles

    def _score(self, hidden: Array) -> Array:
        """`[B, S, D]` → `[B, S]`; a sum, as TPUs round the factors of a dot product."""
        score = self.score.astype(jnp.float32)[None, None]
        return jnp.sum(hidden.astype(jnp.float32) * score, axis=-1)


def _logits(hidden: Array, unembedding: Array) -> Array:
    return jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)


def unstack(layers: Params, num_layers: int) -> list[Params]:
    """Parameters stacked on axis 0 → a list with those of each layer.

    `lax.split` rather than indexing: its gradient is one concatenation, where indexing
    adds as many padded copies as there are layers.
    """
    leaves, structure = jax.tree.flatten(layers)
    split = [jax.lax.split(leaf, (1,) * num_layers, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [parts[i][0] for parts in split])
        for i in range(num_layers)
    ]

"""One decoder-only transformer for all families, in Flax Linen.

The parameters of all blocks are stacked on a leading layer axis, so that the same
checkpoint runs with the blocks unrolled (faster on CPU) or under `lax.scan` (compiles
in constant time). The residual stream is kept as `[B·S, D]`: matrix products over a
single leading axis have far faster weight gradients on CPU.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.algo.logprobs import soft_cap
from rlhf_jax.algo.masking import last_token_index, select_index
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.attention import KVCache, View, attend, causal_mask, positions_of
from rlhf_jax.models.config import Activation, DecoderConfig, Head
from rlhf_jax.models.linear import Linear
from rlhf_jax.models.norms import rms_norm, stream_norm
from rlhf_jax.models.rope import rotary, rotate

Dtype = Any

_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Block(nn.Module):
    """Attention and feed-forward part, each added to the residual stream."""

    config: DecoderConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        view: View,
        past: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One block.

        Args:
            x: `[B·Q, D]`, the residual stream.
            view: of this layer.
            past: `(keys, values, end)`: two of `[B, K, C, H]`, and `[]` int32, the
                column where the new ones are written. None: attend over this call's
                own keys.

        Returns:
            The residual stream and `(keys, values)`, each `[B, K, C, H]`.
        """
        mixed, stored = self.attention(self.norm_before("attention", x), view, past)
        mixed = self.norm_after("attention", mixed)
        if self.config.residual == "parallel":
            return x + mixed + self.mlp(self.norm_before("mlp", x)), stored
        x = x + mixed
        h = self.mlp(self.norm_before("mlp", x))
        return x + self.norm_after("mlp", h), stored

    def attention(
        self, h: Array, view: View, past: tuple[Array, Array, Array] | None
    ) -> tuple[Array, tuple[Array, Array]]:
        """What attention adds to the stream, and its keys and values."""
        c = self.config
        batch, num_queries = view.visible.shape[:2]

        def heads_first(x: Array) -> Array:
            x = x.reshape(batch, num_queries, -1, c.head_dim)
            return x.swapaxes(1, 2)  # [B, N, Q, H]

        queries = self.dense("query", c.num_heads * c.head_dim, c.attention_bias)(h)
        keys = self.dense("key", c.num_kv_heads * c.head_dim, c.attention_bias)(h)
        values = self.dense("value", c.num_kv_heads * c.head_dim, c.attention_bias)(h)
        if c.query_key_norm == "all":
            queries, keys = self.qk_norm("query", queries), self.qk_norm("key", keys)
        queries, keys, values = map(heads_first, (queries, keys, values))
        if c.query_key_norm == "head":
            queries, keys = self.qk_norm("query", queries), self.qk_norm("key", keys)
        if view.rotary is not None:
            queries, keys = rotate(queries, *view.rotary), rotate(keys, *view.rotary)
        if past is not None:
            past_keys, past_values, end = past
            put = jax.lax.dynamic_update_slice_in_dim
            keys = put(past_keys, keys, end, axis=2)
            values = put(past_values, values, end, axis=2)
        mixed = attend(
            queries,
            keys,
            values,
            view.visible,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
        )
        mixed = mixed.swapaxes(1, 2)
        mixed = mixed.reshape(batch * num_queries, c.num_heads * c.head_dim)
        output = self.dense("output", c.width, c.output_bias, residual=True)
        return output(mixed), (keys, values)

    def mlp(self, h: Array) -> Array:
        """What the feed-forward part adds to the stream."""
        c = self.config
        up = self.dense("up", c.mlp_width, c.mlp_bias)
        if c.gated_mlp:
            gate = self.dense("gate", c.mlp_width, c.mlp_bias)(h)
            h = _ACTIVATIONS[c.activation](gate) * up(h)
        else:
            h = _ACTIVATIONS[c.activation](up(h))
        return self.dense("down", c.width, c.mlp_bias, residual=True)(h)

    def norm_before(self, part: str, x: Array) -> Array:
        """The norm in front of a part, where the family has one."""
        if self.config.residual == "post-norm":
            return x
        return self._stream_norm(f"{part}_norm")(x)

    def norm_after(self, part: str, x: Array) -> Array:
        """The norm behind a part, where the family has one."""
        if self.config.residual not in ("post-norm", "sandwich"):
            return x
        return self._stream_norm(f"post_{part}_norm")(x)

    def qk_norm(self, name: str, x: Array) -> Array:
        """The norm of queries or keys."""
        return rms_norm(self.config, self.dtype, self.param_dtype, f"{name}_norm")(x)

    def _stream_norm(self, name: str):
        return stream_norm(self.config, self.dtype, self.param_dtype, name)

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
            rows = c.position_offset + c.max_positions
            self.position_embedding = self.param(
                "position_embedding", init, (rows, c.width), self.param_dtype
            )
        self.block = Block(c, self.dtype, self.param_dtype, parent=None)
        # Beside a kernel may lie leaves that `init` does not draw: see `linear`.
        self.layers = (
            self.get_variable("params", "layers")
            if self.has_variable("params", "layers")
            else self.param("layers", self._init_layers)
        )
        self.final_norm = stream_norm(c, self.dtype, self.param_dtype, "final_norm")
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
        view, _ = self._views(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool))

        def init_one(layer_key: Array) -> Params:
            return self.block.init(layer_key, x, view)["params"]

        return jax.vmap(init_one)(jax.random.split(key, c.num_layers))

    def __call__(self, tokens: Array, mask: Array) -> Array:
        """Head outputs; see the class.

        Args:
            tokens: `[B, S]` int32; ids under padding may be anything in range.
            mask: `[B, S]` bool, True on real tokens; padding on either side.
        """
        hidden = self.hidden(tokens, mask)
        if self.head == "lm":
            return self._logits(hidden, self.unembedding().astype(self.dtype))
        values = self._score(hidden)
        if self.head == "value":
            return values
        return select_index(values, last_token_index(mask))

    def hidden(self, tokens: Array, mask: Array) -> Array:
        """Last hidden state after the final norm, `[B, S, D]`."""
        positions = positions_of(mask)
        x = self._embed(tokens, positions)
        views = self._prompt_views(positions, mask)
        run = lambda params, x, view: self._block(params, x, view)[0]  # noqa: E731
        if self.remat:
            run = jax.checkpoint(run)
        if self.scan_layers:
            x = self._scan(run, x, views)
        else:
            for i, params in enumerate(unstack(self.layers, self.config.num_layers)):
                x = run(params, x, self._view_of(i, views))
        return self.final_norm(x).reshape(*tokens.shape, -1)

    def _scan(self, run: Callable, x: Array, views: tuple[View, View]) -> Array:
        """All blocks under one `lax.scan`, each with the view of its kind."""
        sliding = self.config.sliding_layers
        if len(set(sliding)) < 2:  # all layers are of one kind
            view = self._view_of(0, views)
            x, _ = jax.lax.scan(lambda x, p: (run(p, x, view), None), x, self.layers)
            return x

        def body(x: Array, layer: tuple[Params, Array]) -> tuple[Array, None]:
            params, slides = layer
            view = jax.tree.map(lambda a, b: jnp.where(slides, b, a), *views)
            return run(params, x, view), None

        x, _ = jax.lax.scan(body, x, (self.layers, jnp.array(sliding)))
        return x

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
        positions = positions_of(mask)
        x = self._embed(tokens, positions)
        views = self._prompt_views(positions, mask)
        layers = self._decoding_layers()
        keys, values = [], []
        room = (0, cache_length - tokens.shape[1])
        for i, params in enumerate(layers):
            x, (k, v) = self._block(params, x, self._view_of(i, views))
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
        return self._logits(last, cache.unembedding), cache

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
        x = self._embed(tokens[:, None], position)
        near = mask
        if self.config.sliding_window is not None:
            near = mask & (columns > cache.end - self.config.sliding_window)
        views = self._views(position, mask[:, None], near[:, None])
        keys, values = [], []
        for i, params in enumerate(cache.layers):
            past = (cache.keys[i], cache.values[i], cache.end)
            x, (k, v) = self._block(params, x, self._view_of(i, views), past)
            keys.append(k)
            values.append(v)
        cache = dataclasses.replace(
            cache,
            keys=tuple(keys),
            values=tuple(values),
            mask=mask,
            end=cache.end + 1,
        )
        return self._logits(self.final_norm(x), cache.unembedding), cache

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

    def _embed(self, tokens: Array, positions: Array) -> Array:
        """`[B, S]` → residual stream `[B·S, D]`."""
        c = self.config
        x = self.token_embedding[tokens]
        if c.embedding_scale != 1.0:
            # Rounded as published models round it.
            x = x.astype(self.dtype) * jnp.asarray(c.embedding_scale, self.dtype)
        if c.positions == "learned":
            x = x + self.position_embedding[positions + c.position_offset]
        return x.reshape(-1, c.width).astype(self.dtype)

    def _prompt_views(self, positions: Array, mask: Array) -> tuple[View, View]:
        """Of whole sequences: of layers that see everything, and of the others."""
        near = None
        if self.config.sliding_window is not None:
            near = causal_mask(mask, self.config.sliding_window)
        return self._views(positions, causal_mask(mask), near)

    def _views(
        self, positions: Array, visible: Array, near: Array | None = None
    ) -> tuple[View, View]:
        """From `[B, Q]` positions, and `[B, Q, C]` what all and what sliding layers see
        (None: all)."""
        c = self.config
        near = visible if near is None else near
        if c.positions != "rotary":
            return View(visible=visible, rotary=None), View(visible=near, rotary=None)
        angles = rotary(c.rope, c.head_dim, positions)
        local = angles
        if c.local_rope is not None:
            local = rotary(c.local_rope, c.head_dim, positions)
        return View(visible=visible, rotary=angles), View(visible=near, rotary=local)

    def _view_of(self, layer: int, views: tuple[View, View]) -> View:
        sliding = self.config.sliding_layers
        return views[bool(sliding) and sliding[layer]]

    def _score(self, hidden: Array) -> Array:
        """`[B, S, D]` → `[B, S]`; a sum, as TPUs round the factors of a dot product."""
        score = self.score.astype(jnp.float32)[None, None]
        return jnp.sum(hidden.astype(jnp.float32) * score, axis=-1)

    def _logits(self, hidden: Array, unembedding: Array) -> Array:
        logits = jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logit_softcap)


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

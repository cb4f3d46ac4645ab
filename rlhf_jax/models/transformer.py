"""One decoder-only transformer for all families, in Flax Linen.

The parameters of all blocks are stacked on a leading layer axis, so that the same
checkpoint runs with unrolled blocks (faster on CPU) or with `lax.scan` (compiles in
constant time). The residual stream is `[B·S, D]`: matrix products over a single leading
axis have much faster weight gradients on CPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.algo.logprobs import soft_cap
from rlhf_jax.algo.masking import last_token_index, select_index
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.models.attention import KVCache, View, causal_mask, positions_of
from rlhf_jax.models.block import Block, Dtype
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.norms import stream_norm
from rlhf_jax.models.rope import rotary


class Transformer(nn.Module):
    """A decoder with one of three heads.

    `module.apply({"params": params}, tokens, mask)` returns by head:

    * `"lm"`: logits `[B, S, V]`, column s predicting token s + 1;
    * `"value"`: values `[B, S]`, of the sequence up to and including token s;
    * `"reward"`: scores `[B]`, at the last real token.

    All are float32.

    Attributes:
        config: the architecture.
        head: which of the three.
        dtype: dtype of activations; softmax, norms and head outputs stay float32.
        param_dtype: dtype of parameters.
        scan_layers: run the blocks with `lax.scan` instead of unrolled.
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
        # Kernels may have extra leaves that `init` does not create: see `linear`.
        self.layers = (
            self.get_variable("params", "layers")
            if self.has_variable("params", "layers")
            else self.param("layers", self._init_layers)
        )
        self.final_norm = stream_norm(c, self.dtype, self.param_dtype, "final_norm")
        if self.head != "lm":
            # 1/√(D + 1): initial scores have a variance near 1.
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
        """All blocks in one `lax.scan`, each with the view of its type."""
        sliding = self.config.sliding_layers
        if len(set(sliding)) < 2:  # all layers are of one type
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
        """Processes left-padded prompts.

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
        """Processes one more token per row.

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
        """Parameters of each block, with matrices cast to the compute dtype."""

        def cast(path: tuple, leaf: Array) -> Array:
            is_norm = any(str(key.key).endswith("norm") for key in path)
            # int8 kernels, their scales and dropout keys keep their dtype.
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
            # Rounded as in the published models.
            x = x.astype(self.dtype) * jnp.asarray(c.embedding_scale, self.dtype)
        if c.positions == "learned":
            x = x + self.position_embedding[positions + c.position_offset]
        return x.reshape(-1, c.width).astype(self.dtype)

    def _prompt_views(self, positions: Array, mask: Array) -> tuple[View, View]:
        """The views of full-attention and of sliding-window layers, for full
        sequences."""
        near = None
        if self.config.sliding_window is not None:
            near = causal_mask(mask, self.config.sliding_window)
        return self._views(positions, causal_mask(mask), near)

    def _views(
        self, positions: Array, visible: Array, near: Array | None = None
    ) -> tuple[View, View]:
        """From `[B, Q]` positions, and `[B, Q, C]` masks of full and sliding layers
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
        """`[B, S, D]` → `[B, S]`; a sum, because TPUs round the operands of a dot
        product."""
        score = self.score.astype(jnp.float32)[None, None]
        return jnp.sum(hidden.astype(jnp.float32) * score, axis=-1)

    def _logits(self, hidden: Array, unembedding: Array) -> Array:
        logits = jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logit_softcap)


def unstack(layers: Params, num_layers: int) -> list[Params]:
    """Splits parameters stacked on axis 0 into a list of layers.

    Uses `lax.split` rather than indexing: its gradient is one concatenation, while
    indexing adds one padded copy per layer.
    """
    leaves, structure = jax.tree.flatten(layers)
    split = [jax.lax.split(leaf, (1,) * num_layers, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [parts[i][0] for parts in split])
        for i in range(num_layers)
    ]

"""A transformer block, with what differs by family as fields of its configuration."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from rlhf_jax.algo.types import Array
from rlhf_jax.models.attention import View, attend
from rlhf_jax.models.config import Activation, DecoderConfig
from rlhf_jax.models.linear import Linear
from rlhf_jax.models.norms import rms_norm, stream_norm
from rlhf_jax.models.rope import rotate

Dtype = Any

_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Block(nn.Module):
    """A transformer block: attention and MLP with residual connections."""

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
        """Runs the block.

        Args:
            x: `[B·Q, D]`, the residual stream.
            view: of this layer.
            past: `(keys, values, end)`: two of `[B, K, C, H]`, and `[]` int32, the
                column where the new ones are written. None: attend only over the keys
                of this call.

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
        """The attention output, and its keys and values."""
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
        """The MLP output."""
        c = self.config
        up = self.dense("up", c.mlp_width, c.mlp_bias)
        if c.gated_mlp:
            gate = self.dense("gate", c.mlp_width, c.mlp_bias)(h)
            h = _ACTIVATIONS[c.activation](gate) * up(h)
        else:
            h = _ACTIVATIONS[c.activation](up(h))
        return self.dense("down", c.width, c.mlp_bias, residual=True)(h)

    def norm_before(self, part: str, x: Array) -> Array:
        """The norm before attention or MLP, if the family has one."""
        if self.config.residual == "post-norm":
            return x
        return self._stream_norm(f"{part}_norm")(x)

    def norm_after(self, part: str, x: Array) -> Array:
        """The norm after attention or MLP, if the family has one."""
        if self.config.residual not in ("post-norm", "sandwich"):
            return x
        return self._stream_norm(f"post_{part}_norm")(x)

    def qk_norm(self, name: str, x: Array) -> Array:
        """The norm of queries or keys."""
        return rms_norm(self.config, self.dtype, self.param_dtype, f"{name}_norm")(x)

    def _stream_norm(self, name: str):
        return stream_norm(self.config, self.dtype, self.param_dtype, name)

    def dense(self, name: str, features: int, bias: bool, *, residual: bool = False):
        """A projection; those that write to the residual stream have a smaller init."""
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

"""A matrix product whose matrix may be stored in 8 bits, or carry a low-rank change.

All of it follows from the leaves that lie beside `kernel` in the parameter tree, so one
network runs with full, frozen, quantised and adapted parameters alike.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array

Dtype = Any


class Linear(nn.Module):
    """y = x W + b, and whatever the parameter tree adds to it.

    Leaves beside `kernel` `[D, F]` and `bias` `[F]`:

    * `kernel_scale` `[F]` float32: `kernel` is int8, and W = kernel · kernel_scale;
    * `lora_a` `[D, R]`, `lora_b` `[R, F]`: W gains A B, computed as (x A) B;
    * `lora_rate` `[]` float32, `lora_key` `[2]` uint32: dropout of x on its way into A.

    Attributes:
        features: F.
        use_bias: whether there is a bias.
        dtype: of the product; matrices are cast to it.
        param_dtype: of fresh parameters.
        kernel_init: draws a fresh kernel.

    References:
        Hu et al., 2021, arXiv:2106.09685.
    """

    features: int
    use_bias: bool
    dtype: Dtype
    param_dtype: Dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[N, D]` → `[N, F]`."""
        x = x.astype(self.dtype)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        scale = self._beside("kernel_scale")
        if scale is not None:
            # Tied to x: else XLA converts all kernels once, in front of a loop over
            # tokens or microbatches, and holds the large ones throughout.
            kernel, x = jax.lax.optimization_barrier((kernel, x))
            y = x @ kernel.astype(self.dtype)
            y = (y.astype(jnp.float32) * scale[None]).astype(self.dtype)
        else:
            y = x @ kernel.astype(self.dtype)
        a, b = self._beside("lora_a"), self._beside("lora_b")
        if a is not None and b is not None:
            low = self._dropped(x) @ a.astype(self.dtype)
            y = y + low @ b.astype(self.dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)[None]
        return y

    def _beside(self, name: str) -> Array | None:
        """A leaf that the tree may have; never created."""
        return self.get_variable("params", name, None)

    def _dropped(self, x: Array) -> Array:
        """Inverted dropout, where the tree asks for it."""
        rate, key = self._beside("lora_rate"), self._beside("lora_key")
        if rate is None or key is None:
            return x
        keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0.0).astype(x.dtype)

"""A linear layer with optional int8 kernel and LoRA.

The leaves next to `kernel` in the parameter tree select the computation, so one network
runs with full, frozen, quantized and adapted parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array

Dtype = Any


class Linear(nn.Module):
    """y = x W + b, plus what the parameter tree adds.

    Leaves next to `kernel` `[D, F]` and `bias` `[F]`:

    * `kernel_scale` `[F]` float32: `kernel` is int8, and W = kernel · kernel_scale;
    * `lora_a` `[D, R]`, `lora_b` `[R, F]`: A B is added to W, computed as (x A) B;
    * `lora_rate` `[]` float32, `lora_key` `[2]` uint32: dropout on the input of A.

    Attributes:
        features: F.
        use_bias: whether there is a bias.
        dtype: of the product; matrices are cast to it.
        param_dtype: of new parameters.
        kernel_init: initializer of the kernel.

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
            # Depends on x: otherwise XLA hoists the conversion of all kernels out of
            # the loop over tokens or microbatches and keeps the large copies.
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
        """An optional leaf of the tree; never created."""
        return self.get_variable("params", name, None)

    def _dropped(self, x: Array) -> Array:
        """Inverted dropout, if the tree has a rate."""
        rate, key = self._beside("lora_rate"), self._beside("lora_key")
        if rate is None or key is None:
            return x
        keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0.0).astype(x.dtype)

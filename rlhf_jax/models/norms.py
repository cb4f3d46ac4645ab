"""Normalization of the residual stream, and of queries and keys."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.algo.types import Array
from rlhf_jax.models.config import DecoderConfig

Dtype = Any


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · scale, over the last axis; computed in float32.

    Attributes:
        epsilon: ε.
        plus_one: the scale is stored minus 1.
        dtype: of the result.
        param_dtype: of the scale.

    References:
        Zhang and Sennrich, 2019, arXiv:1910.07467.
    """

    epsilon: float
    plus_one: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` → `[..., D]`."""
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        scale = scale.astype(jnp.float32) + float(self.plus_one)
        x = x.astype(jnp.float32)
        size = jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * (jax.lax.rsqrt(size) * scale)).astype(self.dtype)


def stream_norm(config: DecoderConfig, dtype: Dtype, param_dtype: Dtype, name: str):
    """The norm of the residual stream: LayerNorm or RMSNorm, statistics in float32."""
    if config.norm != "layer":
        return rms_norm(config, dtype, param_dtype, name)
    return nn.LayerNorm(
        epsilon=config.norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,  # E[x²] - E[x]² cancels in float32
        name=name,
    )


def rms_norm(config: DecoderConfig, dtype: Dtype, param_dtype: Dtype, name: str):
    """The RMSNorm of a family."""
    return RMSNorm(
        epsilon=config.norm_eps,
        plus_one=config.norm == "rms_plus_one",
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )

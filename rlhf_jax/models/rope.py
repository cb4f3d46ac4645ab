"""Rotary position embeddings and their scaling for long contexts."""

import dataclasses
import math

import jax.numpy as jnp

from rlhf_jax.algo.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
    """Positions divided by `factor` (Chen et al., 2023, arXiv:2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRopeScaling:
    """The base grows with the sequence once it exceeds the training length.

    θ' = θ · (factor · length / original − (factor − 1))^(R / (R − 2)), for a row of
    `length` tokens ("NTK-aware", "dynamic NTK").
    """

    factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency-dependent scaling (Llama 3.1, section 3.4)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRopeScaling:
    """YaRN: low frequencies are scaled, high ones kept, attention sharpened.

    References:
        Peng et al., 2023, arXiv:2309.00071.
    """

    factor: float
    original_max_positions: int
    attention_factor: float  # of cosine and sine
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the bounds of the blend to whole dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A factor per frequency, for short and for long texts (Phi-3).

    References:
        Ding et al., 2024, arXiv:2402.13753.
    """

    short_factor: tuple[float, ...]  # R / 2
    long_factor: tuple[float, ...]  # R / 2, for rows longer than the original length
    original_max_positions: int
    attention_factor: float  # of cosine and sine


RopeScaling = (
    LinearRopeScaling
    | DynamicRopeScaling
    | Llama3RopeScaling
    | YarnRopeScaling
    | LongRopeScaling
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of some layers.

    Attributes:
        theta: base of the frequencies.
        share: fraction of the dimensions of a head that is rotated; the first ones.
        scaling: of the frequencies, or None.
    """

    theta: float = 10_000.0
    share: float = 1.0
    scaling: RopeScaling | None = None

    def size(self, head_dim: int) -> int:
        """R, the number of rotated dimensions of a head."""
        return int(head_dim * self.share)


def rotary(rope: Rope, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of the angle of each pair of dimensions, by position.

    θ_i = base^(-2i / R), scaled according to `rope.scaling`; angle = position · θ_i.

    Args:
        rope: base, share and scaling.
        head_dim: H.
        positions: `[B, S]` int32. If angles depend on a row's length, it is one more
            than its last position.

    Returns:
        Two of `[B, S, R / 2]` float32, times the scaling's attention factor.

    References:
        Su et al., 2021, arXiv:2104.09864.
    """
    size = rope.size(head_dim)
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    lengths = jnp.max(positions, axis=1, keepdims=True) + 1  # [B, 1]
    frequencies = _stretched(rope, exponents[None], lengths, size)  # [1 or B, R/2]
    angles = positions[..., None].astype(jnp.float32) * frequencies[:, None]
    factor = 1.0
    if isinstance(rope.scaling, YarnRopeScaling | LongRopeScaling):
        factor = rope.scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + R/2}) of each head; other dimensions are
    unchanged.

    Args:
        x: `[B, N, S, H]`, queries or keys.
        cos: `[B, S, R / 2]` float32.
        sin: `[B, S, R / 2]` float32.

    Returns:
        `[B, N, S, H]`, dtype of `x`.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    wide = x.astype(jnp.float32)
    low, high = wide[..., :half], wide[..., half : 2 * half]
    turned = [low * cos - high * sin, high * cos + low * sin]
    return jnp.concatenate([*turned, wide[..., 2 * half :]], axis=-1).astype(x.dtype)


def _stretched(rope: Rope, exponents: Array, lengths: Array, size: int) -> Array:
    """Frequencies `[1 or B, R / 2]`, of exponents `[1, R / 2]` and lengths `[B, 1]`."""
    scaling = rope.scaling
    if isinstance(scaling, DynamicRopeScaling):
        longest = jnp.maximum(lengths, scaling.original_max_positions)
        growth = scaling.factor * longest / scaling.original_max_positions
        growth = (growth - (scaling.factor - 1.0)) ** (size / (size - 2))
        return (rope.theta * growth) ** -exponents
    frequencies = rope.theta**-exponents
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3RopeScaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnRopeScaling):
        return _yarn(frequencies, scaling, theta=rope.theta, size=size)
    if isinstance(scaling, LongRopeScaling):
        short, long = (
            jnp.asarray(factors, jnp.float32)[None]
            for factors in (scaling.short_factor, scaling.long_factor)
        )
        is_long = lengths > scaling.original_max_positions
        return frequencies / jnp.where(is_long, long, short)
    return frequencies


def _llama3(frequencies: Array, scaling: Llama3RopeScaling) -> Array:
    """Divides low frequencies by `factor`, keeps high ones, blends in between."""
    rotations = scaling.original_max_positions * frequencies / (2 * math.pi)
    blend = (rotations - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = jnp.clip(blend, 0.0, 1.0)
    return blend * frequencies + (1.0 - blend) * frequencies / scaling.factor


def _yarn(
    frequencies: Array, scaling: YarnRopeScaling, *, theta: float, size: int
) -> Array:
    """Keeps what turns `beta_fast` times in the original length, divides by `factor`
    what turns `beta_slow` times, and blends by dimension in between."""

    def dimension(rotations: float) -> float:
        ratio = scaling.original_max_positions / (rotations * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    ramp = (jnp.arange(size // 2, dtype=jnp.float32) - low) / (high - low)
    ramp = jnp.clip(ramp, 0.0, 1.0)[None]
    return ramp * frequencies / scaling.factor + (1.0 - ramp) * frequencies

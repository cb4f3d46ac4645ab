"""The shape of a decoder-only transformer."""

import dataclasses
from typing import Literal

Head = Literal["lm", "value", "reward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Frequency-dependent stretching of rotary positions (Llama 3.1, section 3.4)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What distinguishes one decoder of the GPT-2 and Llama families from another.

    Attributes:
        vocab_size: V, rows of the token embedding.
        max_positions: longest sequence the model accepts, in tokens.
        width: D, size of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; a divisor of `num_heads`.
        head_dim: size of one head.
        mlp_width: hidden size of the feed-forward part.
        positions: `"learned"` (a table added to the embedding) or `"rotary"`.
        norm: `"layer"` (LayerNorm with bias) or `"rms"` (RMSNorm).
        mlp: `"gelu"` (tanh form, two matrices) or `"swiglu"` (three matrices).
        attention_bias: biases on the query, key and value projections.
        projection_bias: biases on the attention output and the feed-forward part.
        tie_embeddings: the output matrix is the token embedding.
        norm_eps: ε inside the normalisation.
        rope_theta: base of the rotary frequencies.
        rope_scaling: stretching of the rotary frequencies, or None.
        initializer_range: standard deviation of freshly drawn matrices.
    """

    vocab_size: int
    max_positions: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    positions: Literal["learned", "rotary"]
    norm: Literal["layer", "rms"]
    mlp: Literal["gelu", "swiglu"]
    attention_bias: bool
    projection_bias: bool
    tie_embeddings: bool
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; each key/value head serves an "
                "equal number of query heads"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary positions turn pairs of "
                "dimensions, so it must be even"
            )


def gpt2_config(
    *, vocab_size: int, max_positions: int, width: int, num_layers: int, num_heads: int
) -> DecoderConfig:
    """A decoder of the GPT-2 family: learned positions, LayerNorm, GELU, tied."""
    _check_heads(width, num_heads)
    return DecoderConfig(
        vocab_size=vocab_size,
        max_positions=max_positions,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=4 * width,
        positions="learned",
        norm="layer",
        mlp="gelu",
        attention_bias=True,
        projection_bias=True,
        tie_embeddings=True,
    )


def llama_config(
    *,
    vocab_size: int,
    max_positions: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    mlp_width: int | None = None,
    tie_embeddings: bool = False,
    rope_theta: float = 10_000.0,
    rope_scaling: Llama3RopeScaling | None = None,
) -> DecoderConfig:
    """A decoder of the Llama family: rotary positions, RMSNorm, SwiGLU, no biases."""
    _check_heads(width, num_heads)
    return DecoderConfig(
        vocab_size=vocab_size,
        max_positions=max_positions,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=width // num_heads,
        # Three matrices of 8/3 the width cost what two of four times the width do.
        mlp_width=mlp_width or -(-8 * width // 96) * 32,
        positions="rotary",
        norm="rms",
        mlp="swiglu",
        attention_bias=False,
        projection_bias=False,
        tie_embeddings=tie_embeddings,
        norm_eps=1e-5,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"width={width} is not a multiple of num_heads={num_heads}; every head "
            "gets width / num_heads dimensions"
        )

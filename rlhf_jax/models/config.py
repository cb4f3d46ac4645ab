"""The configuration of a decoder-only transformer."""

import dataclasses
from typing import Literal

from rlhf_jax.models.rope import LongRopeScaling, Rope, RopeScaling

Head = Literal["lm", "value", "reward"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a decoder.

    Attributes:
        family: `model_type` of the checkpoints that the model is loaded from and saved
            as; the other fields define what it computes.
        vocab_size: V, rows of the token embedding.
        max_positions: longest sequence the model accepts, in tokens.
        width: D, size of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; a divisor of `num_heads`.
        head_dim: size of one head.
        mlp_width: hidden size of the MLP.
        positions: `"learned"` (a table added to the embedding) or `"rotary"`.
        position_offset: row of that table for position 0.
        rope: rotary positions of all layers, or of those with full attention.
        local_rope: rotary positions of layers with a sliding window, if different.
        norm: `"layer"` (LayerNorm with bias), `"rms"` (RMSNorm) or `"rms_plus_one"`
            (RMSNorm whose scale is stored minus 1).
        residual: position of norms: `"pre-norm"`, before attention and MLP;
            `"post-norm"`, after each, before the residual addition; `"sandwich"`, both;
            `"parallel"`, before, with attention and MLP in parallel.
        query_key_norm: RMSNorm of queries and keys before the rotation: `"none"`, per
            `"head"`, or over `"all"` heads.
        activation: `"gelu"`, its `"gelu_tanh"` approximation, `"relu"` or `"silu"`.
        gated_mlp: down(activation(gate) · up), with three matrices instead of two.
        attention_bias: biases on the query, key and value projections.
        output_bias: a bias on the attention output.
        mlp_bias: biases in the MLP.
        attention_scale: scale of queries · keys; None: 1 / √head_dim.
        attention_softcap: c: attention logits become c · tanh(logit / c).
        logit_softcap: the same for the output logits.
        embedding_scale: scale of the input token embedding.
        sliding_window: window size in tokens, including the current one.
        sliding_layers: which layers have the window, L flags; empty: none.
        tie_embeddings: the output matrix is the token embedding.
        norm_eps: ε of the norms.
        initializer_range: standard deviation of newly initialized matrices.
    """

    family: str
    vocab_size: int
    max_positions: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    positions: Literal["learned", "rotary"] = "rotary"
    position_offset: int = 0
    rope: Rope = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    norm: Literal["layer", "rms", "rms_plus_one"] = "rms"
    residual: Literal["pre-norm", "post-norm", "sandwich", "parallel"] = "pre-norm"
    query_key_norm: Literal["none", "head", "all"] = "none"
    activation: Activation = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; choose num_kv_heads as a divisor"
            )
        turned = self.rope.size(self.head_dim)
        if self.positions == "rotary" and turned % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, or the share of it that rotary "
                f"positions turn, {turned}; they turn pairs of dimensions, so it must "
                "be even"
            )
        scaling = self.rope.scaling
        if isinstance(scaling, LongRopeScaling):
            counts = {len(scaling.short_factor), len(scaling.long_factor)}
            if counts != {turned // 2}:
                raise ValueError(
                    f"short_factor and long_factor have {sorted(counts)} numbers; give "
                    f"one for each of the {turned // 2} pairs of dimensions"
                )
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"sliding_layers has {len(self.sliding_layers)} entries for "
                f"{self.num_layers} layers; give one for each"
            )
        if any(self.sliding_layers) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window={self.sliding_window} with "
                f"{sum(self.sliding_layers)} layers in sliding_layers; give both or "
                "neither"
            )


def gpt2_config(
    *, vocab_size: int, max_positions: int, width: int, num_layers: int, num_heads: int
) -> DecoderConfig:
    """A decoder of the GPT-2 family: learned positions, LayerNorm, GELU, tied."""
    _check_heads(width, num_heads)
    return DecoderConfig(
        family="gpt2",
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
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
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
    rope_scaling: RopeScaling | None = None,
) -> DecoderConfig:
    """A decoder of the Llama family: rotary positions, RMSNorm, SwiGLU, no biases."""
    _check_heads(width, num_heads)
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        max_positions=max_positions,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=width // num_heads,
        # Three matrices with 8/3 of the width cost the same as two with 4 times the
        # width.
        mlp_width=mlp_width or -(-8 * width // 96) * 32,
        rope=Rope(theta=rope_theta, scaling=rope_scaling),
        tie_embeddings=tie_embeddings,
    )


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"width={width} is not a multiple of num_heads={num_heads}; choose "
            "num_heads as a divisor"
        )

"""GPT-2: learned positions, LayerNorm, biases, fused query, key and value."""

import dataclasses
import re

from rlhf_jax.files.typed_fields import Fields, flag, integer, number
from rlhf_jax.models.config import DecoderConfig, gpt2_config
from rlhf_jax.models.families.family import Family, TensorRule, norm
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    expect,
    layers,
    size,
)


def read(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `gpt2`. Raises ValueError naming the field."""
    expect(fields, "scale_attn_weights", True)
    expect(fields, "scale_attn_by_inverse_layer_idx", False)
    expect(fields, "add_cross_attention", False)
    width = size(fields, "n_embd")
    config = gpt2_config(
        vocab_size=size(fields, "vocab_size"),
        max_positions=integer(fields, "n_positions"),
        width=width,
        num_layers=layers(fields, "n_layer"),
        num_heads=size(fields, "n_head"),
    )
    return dataclasses.replace(
        config,
        mlp_width=size(fields, "n_inner", default=4 * width),
        activation=activation(fields, "activation_function", "gelu_new"),
        tie_embeddings=flag(fields, "tie_word_embeddings", default=True),
        norm_eps=number(fields, "layer_norm_epsilon", default=1e-5),
        initializer_range=number(fields, "initializer_range", default=0.02),
    )


def write(config: DecoderConfig) -> Fields:
    """The fields that `read` reads."""
    name = activation_name(config.activation)
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new" if name == "gelu_pytorch_tanh" else name,
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _conv1d(name: str, *leaves: str) -> tuple[TensorRule, TensorRule]:
    """GPT-2's `Conv1D` of every layer: stored `[in, out]`, like ours."""
    return (
        TensorRule(
            name=f"h.{{layer}}.{name}.weight",
            leaves=tuple(f"layers/{leaf}/kernel" for leaf in leaves),
        ),
        TensorRule(
            name=f"h.{{layer}}.{name}.bias",
            leaves=tuple(f"layers/{leaf}/bias" for leaf in leaves),
        ),
    )


GPT2 = Family(
    model_type="gpt2",
    lm_class="GPT2LMHeadModel",
    score_class="GPT2ForSequenceClassification",
    prefix="transformer.",
    trunk=(
        TensorRule(name="wte.weight", leaves=("token_embedding",)),
        TensorRule(name="wpe.weight", leaves=("position_embedding",)),
        *norm("h.{layer}.ln_1", "layers/attention_norm"),
        *_conv1d("attn.c_attn", "query", "key", "value"),
        *_conv1d("attn.c_proj", "output"),
        *norm("h.{layer}.ln_2", "layers/mlp_norm"),
        *_conv1d("mlp.c_fc", "up"),
        *_conv1d("mlp.c_proj", "down"),
        *norm("ln_f", "final_norm"),
    ),
    buffers=re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"),  # causal mask
    read=read,
    write=write,
)

"""OPT: learned positions with offset 2, LayerNorm, ReLU, biases."""

import re

from rlhf_jax.files.typed_fields import Fields, flag, integer, number
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import Family, TensorRule, linear, norm
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    expect,
    layers,
    size,
)


def read(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `opt`. Raises ValueError naming the field."""
    width, num_heads = (
        size(fields, name) for name in ("hidden_size", "num_attention_heads")
    )
    expect(fields, "do_layer_norm_before", True)  # only opt-350m has False
    expect(fields, "_remove_final_layer_norm", False)
    expect(fields, "layer_norm_elementwise_affine", True)
    expect(fields, "word_embed_proj_dim", None, width)
    biases = flag(fields, "enable_bias", default=True)
    return DecoderConfig(
        family="opt",
        vocab_size=size(fields, "vocab_size"),
        max_positions=integer(fields, "max_position_embeddings"),
        width=width,
        num_layers=layers(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(width // num_heads, 1),
        mlp_width=size(fields, "ffn_dim"),
        positions="learned",
        position_offset=2,
        norm="layer",
        activation=activation(fields, "activation_function", "relu"),
        gated_mlp=False,
        attention_bias=biases,
        output_bias=biases,
        mlp_bias=biases,
        tie_embeddings=flag(fields, "tie_word_embeddings", default=True),
        norm_eps=1e-5,  # not in the file: PyTorch's default
        initializer_range=number(fields, "init_std", default=0.02),
    )


def write(config: DecoderConfig) -> Fields:
    """The fields that `read` reads."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.mlp_width,
        "activation_function": activation_name(config.activation),
        "do_layer_norm_before": True,
        "enable_bias": config.attention_bias,
        "layer_norm_elementwise_affine": True,
        "init_std": config.initializer_range,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


_LAYER = "decoder.layers.{layer}"

OPT = Family(
    model_type="opt",
    lm_class="OPTForCausalLM",
    score_class="OPTForSequenceClassification",
    prefix="model.",
    trunk=(
        TensorRule(name="decoder.embed_tokens.weight", leaves=("token_embedding",)),
        TensorRule(
            name="decoder.embed_positions.weight", leaves=("position_embedding",)
        ),
        *norm(f"{_LAYER}.self_attn_layer_norm", "layers/attention_norm"),
        *linear(f"{_LAYER}.self_attn.q_proj", "query"),
        *linear(f"{_LAYER}.self_attn.k_proj", "key"),
        *linear(f"{_LAYER}.self_attn.v_proj", "value"),
        *linear(f"{_LAYER}.self_attn.out_proj", "output"),
        *norm(f"{_LAYER}.final_layer_norm", "layers/mlp_norm"),
        *linear(f"{_LAYER}.fc1", "up"),
        *linear(f"{_LAYER}.fc2", "down"),
        *norm("decoder.final_layer_norm", "final_norm"),
    ),
    buffers=re.compile(r"(?!)"),  # none
    read=read,
    write=write,
)

"""Gemma 2 and the text model of Gemma 3: sandwich norms, sliding windows.

Gemma 2 uses logit soft-capping; Gemma 3 uses QK-norm instead, and a different rotary
base in layers with a window.
"""

from typing import Any

from rlhf_jax.files.typed_fields import (
    Fields,
    flag,
    integer,
    number,
    optional_integer,
    optional_number,
    section,
)
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import QUERY_KEY_NORMS, llama_family
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    expect,
    llama_size_fields,
    llama_sizes,
    read_layer_types,
    sliding,
    write_layer_types,
)
from rlhf_jax.models.families.rope_fields import read_rope, write_rope, write_scaling
from rlhf_jax.models.rope import Rope


def read_gemma2(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `gemma2`. Raises ValueError naming the field."""
    return DecoderConfig(
        family="gemma2",
        rope=read_rope(fields),
        attention_softcap=optional_number(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=optional_number(fields, "final_logit_softcapping", 30.0),
        **_shared(fields, every=2),
    )


def read_gemma3(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `gemma3_text`. Raises ValueError naming the field."""
    everywhere, nearby = _read_two_ropes(fields)
    return DecoderConfig(
        family="gemma3_text",
        rope=everywhere,
        local_rope=nearby,
        query_key_norm="head",
        attention_softcap=optional_number(fields, "attn_logit_softcapping"),
        logit_softcap=optional_number(fields, "final_logit_softcapping"),
        **_shared(fields, every=integer(fields, "sliding_window_pattern", default=6)),
    )


def write_gemma2(config: DecoderConfig) -> Fields:
    """The fields that `read_gemma2` reads."""
    return _shared_fields(config) | write_rope(config.rope)


def write_gemma3(config: DecoderConfig) -> Fields:
    """The fields that `read_gemma3` reads."""
    nearby = config.local_rope or config.rope
    scaling = write_scaling(config.rope.scaling)
    return _shared_fields(config) | {
        "rope_theta": config.rope.theta,
        "rope_local_base_freq": nearby.theta,
        "rope_scaling": None if config.rope.scaling is None else scaling,
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": config.rope.theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": nearby.theta},
        },
    }


def _read_two_ropes(fields: Fields) -> tuple[Rope, Rope]:
    """The ropes of full-attention layers and of sliding-window layers."""
    by_type = section(fields, "rope_parameters")
    if "full_attention" in by_type:  # format of transformers 5
        rest = {
            k: v
            for k, v in fields.items()
            if k not in ("rope_theta", "rope_scaling", "rope_parameters")
        }
        everywhere = rest | {"rope_parameters": by_type["full_attention"]}
        nearby = rest | {"rope_parameters": by_type.get("sliding_attention")}
        return read_rope(everywhere, theta=1e6), read_rope(nearby)
    theta = number(fields, "rope_local_base_freq", default=10_000.0)
    return read_rope(fields, theta=1e6), Rope(theta=theta)


def _shared(fields: Fields, *, every: int) -> dict[str, Any]:
    """The fields shared by both generations.

    Args:
        fields: of `config.json`.
        every: every `every`th layer has full attention, unless the file lists them.
    """
    expect(fields, "use_bidirectional_attention", None, False)
    sizes = llama_sizes({"head_dim": 256, "num_key_value_heads": 4} | fields)
    window = optional_integer({"sliding_window": 4096} | fields, "sliding_window")
    by_number = tuple((i + 1) % every != 0 for i in range(sizes["num_layers"]))
    biases = flag(fields, "attention_bias", default=False)
    # hidden_activation is the newer name and takes precedence.
    name = "hidden_activation" if fields.get("hidden_activation") else "hidden_act"
    return {
        **sizes,
        "norm": "rms_plus_one",
        "residual": "sandwich",
        "activation": activation(fields, name, "gelu_pytorch_tanh"),
        "attention_bias": biases,
        "output_bias": biases,
        "attention_scale": number(fields, "query_pre_attn_scalar", default=256) ** -0.5,
        "embedding_scale": sizes["width"] ** 0.5,
        "tie_embeddings": flag(fields, "tie_word_embeddings", default=True),
        "norm_eps": number(fields, "rms_norm_eps", default=1e-6),
        **sliding(window, read_layer_types(fields, by_number)),
    }


def _shared_fields(config: DecoderConfig) -> Fields:
    """The fields that `_shared` and the soft caps read."""
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    whole = round(scalar)
    return {
        **llama_size_fields(config),
        "hidden_activation": activation_name(config.activation),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": whole if abs(scalar - whole) < 1e-6 else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": write_layer_types(config),
        "use_bidirectional_attention": False,
    }


_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}

GEMMA2 = llama_family(
    "gemma2",
    "Gemma2ForCausalLM",
    read=read_gemma2,
    write=write_gemma2,
    norms=_NORMS,
)
GEMMA3 = llama_family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    score_class="Gemma3TextForSequenceClassification",
    read=read_gemma3,
    write=write_gemma3,
    norms=_NORMS | QUERY_KEY_NORMS,
)

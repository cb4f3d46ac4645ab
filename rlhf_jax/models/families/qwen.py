"""Qwen 2 and 2.5, with biases on queries, keys and values; Qwen 3, with norms."""

from typing import Any

from rlhf_jax.files.typed_fields import Fields, flag, integer, number, optional_integer
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import PRE_NORMS, QUERY_KEY_NORMS, llama_family
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    llama_size_fields,
    llama_sizes,
    read_layer_types,
    sliding,
    write_layer_types,
)
from rlhf_jax.models.families.rope_fields import read_rope, write_rope


def read_qwen2(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `qwen2`. Raises ValueError naming the field."""
    return DecoderConfig(family="qwen2", attention_bias=True, **_shared(fields))


def read_qwen3(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `qwen3`. Raises ValueError naming the field."""
    biases = flag(fields, "attention_bias", default=False)
    return DecoderConfig(
        family="qwen3",
        query_key_norm="head",
        attention_bias=biases,
        output_bias=biases,
        **_shared({"head_dim": 128} | fields),
    )


def write_qwen2(config: DecoderConfig) -> Fields:
    """The fields that `read_qwen2` reads."""
    slides = config.sliding_window is not None
    first = config.sliding_layers.index(True) if slides else config.num_layers
    return {
        **llama_size_fields(config),
        "hidden_act": activation_name(config.activation),
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": write_layer_types(config),
        **write_rope(config.rope),
    }


def write_qwen3(config: DecoderConfig) -> Fields:
    """The fields that `read_qwen3` reads."""
    return write_qwen2(config) | {"attention_bias": config.attention_bias}


def _first_window(fields: Fields) -> int:
    """The first layer with a window; 0: all have one."""
    first = fields["max_window_layers"]
    return 0 if first == 0 else integer(fields, "max_window_layers")


def _shared(fields: Fields) -> dict[str, Any]:
    sizes = llama_sizes(fields)
    window = None
    if flag(fields, "use_sliding_window", default=False):
        window = optional_integer({"sliding_window": 4096} | fields, "sliding_window")
    first = 28 if fields.get("max_window_layers") is None else _first_window(fields)
    by_number = tuple(i >= first for i in range(sizes["num_layers"]))
    return {
        **sizes,
        "rope": read_rope(fields),
        "activation": activation(fields, "hidden_act", "silu"),
        "tie_embeddings": flag(fields, "tie_word_embeddings", default=False),
        "norm_eps": number(fields, "rms_norm_eps", default=1e-6),
        **sliding(window, read_layer_types(fields, by_number)),
    }


QWEN2 = llama_family("qwen2", "Qwen2ForCausalLM", read=read_qwen2, write=write_qwen2)
QWEN3 = llama_family(
    "qwen3",
    "Qwen3ForCausalLM",
    read=read_qwen3,
    write=write_qwen3,
    norms=PRE_NORMS | QUERY_KEY_NORMS,
)

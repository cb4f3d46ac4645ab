"""Llama 2 and 3, SmolLM and similar models; and Mistral, with a sliding window."""

from rlhf_jax.files.typed_fields import Fields, flag, number, optional_integer
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import llama_family
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    llama_size_fields,
    llama_sizes,
    read_layer_types,
    sliding,
)
from rlhf_jax.models.families.rope_fields import read_rope, write_rope


def read_llama(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `llama`. Raises ValueError naming the field."""
    biases = flag(fields, "attention_bias", default=False)
    return DecoderConfig(
        family="llama",
        **llama_sizes(fields),
        rope=read_rope(fields),
        activation=activation(fields, "hidden_act", "silu"),
        attention_bias=biases,
        output_bias=biases,
        mlp_bias=flag(fields, "mlp_bias", default=False),
        tie_embeddings=flag(fields, "tie_word_embeddings", default=False),
        norm_eps=number(fields, "rms_norm_eps", default=1e-6),
    )


def write_llama(config: DecoderConfig) -> Fields:
    """The fields that `read_llama` reads."""
    return {
        **llama_size_fields(config),
        "hidden_act": activation_name(config.activation),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        **write_rope(config.rope),
    }


def read_mistral(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `mistral`. Raises ValueError naming the field."""
    sizes = llama_sizes(fields)
    # Files older than the field mean the default window of that time.
    window = optional_integer({"sliding_window": 4096} | fields, "sliding_window")
    layers = read_layer_types(fields, (True,) * sizes["num_layers"])
    return DecoderConfig(
        family="mistral",
        **sizes,
        rope=read_rope(fields),
        activation=activation(fields, "hidden_act", "silu"),
        tie_embeddings=flag(fields, "tie_word_embeddings", default=False),
        norm_eps=number(fields, "rms_norm_eps", default=1e-6),
        **sliding(window, layers),
    )


def write_mistral(config: DecoderConfig) -> Fields:
    """The fields that `read_mistral` reads."""
    return {
        **llama_size_fields(config),
        "hidden_act": activation_name(config.activation),
        "sliding_window": config.sliding_window,
        **write_rope(config.rope),
    }


LLAMA = llama_family("llama", "LlamaForCausalLM", read=read_llama, write=write_llama)
MISTRAL = llama_family(
    "mistral", "MistralForCausalLM", read=read_mistral, write=write_mistral
)

"""OLMo 2: norms after attention and MLP, QK-norm over all heads."""

from rlhf_jax.files.typed_fields import Fields, flag, number
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import QUERY_KEY_NORMS, llama_family
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    llama_size_fields,
    llama_sizes,
)
from rlhf_jax.models.families.rope_fields import read_rope, write_rope


def read(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `olmo2`. Raises ValueError naming the field."""
    biases = flag(fields, "attention_bias", default=False)
    return DecoderConfig(
        family="olmo2",
        **llama_sizes(fields),
        rope=read_rope(fields),
        residual="post-norm",
        query_key_norm="all",
        activation=activation(fields, "hidden_act", "silu"),
        attention_bias=biases,
        output_bias=biases,
        tie_embeddings=flag(fields, "tie_word_embeddings", default=False),
        norm_eps=number(fields, "rms_norm_eps", default=1e-5),
    )


def write(config: DecoderConfig) -> Fields:
    """The fields that `read` reads."""
    return {
        **llama_size_fields(config),
        "hidden_act": activation_name(config.activation),
        "attention_bias": config.attention_bias,
        **write_rope(config.rope),
    }


OLMO2 = llama_family(
    "olmo2",
    "Olmo2ForCausalLM",
    read=read,
    write=write,
    norms=QUERY_KEY_NORMS
    | {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    },
)

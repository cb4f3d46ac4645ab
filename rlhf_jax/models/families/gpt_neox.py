"""GPT-NeoX (Pythia): rotary positions on a quarter of each head, parallel residual."""

import dataclasses
import re

from rlhf_jax.files.typed_fields import Fields, flag, integer, number
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import LM_HEAD, Family, TensorRule, linear, norm
from rlhf_jax.models.families.fields import activation, activation_name, layers, size
from rlhf_jax.models.families.rope_fields import read_rope, write_rope


def read(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `gpt_neox`. Raises ValueError naming the field."""
    width, num_heads = (
        size(fields, name) for name in ("hidden_size", "num_attention_heads")
    )
    biases = flag(fields, "attention_bias", default=True)
    parallel = flag(fields, "use_parallel_residual", default=True)
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=size(fields, "vocab_size"),
        max_positions=integer(fields, "max_position_embeddings"),
        width=width,
        num_layers=layers(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(width // num_heads, 1),
        mlp_width=size(fields, "intermediate_size"),
        rope=read_rope(
            fields,
            # Their names in transformers 4.
            theta=number(fields, "rotary_emb_base", default=10_000.0),
            share=number(fields, "rotary_pct", default=0.25),
        ),
        norm="layer",
        residual="parallel" if parallel else "pre-norm",
        activation=activation(fields, "hidden_act", "gelu"),
        gated_mlp=False,
        attention_bias=biases,
        output_bias=biases,
        mlp_bias=True,
        tie_embeddings=flag(fields, "tie_word_embeddings", default=False),
        norm_eps=number(fields, "layer_norm_eps", default=1e-5),
        initializer_range=number(fields, "initializer_range", default=0.02),
    )


def write(config: DecoderConfig) -> Fields:
    """The fields that `read` reads."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_pct": config.rope.share,
        "rotary_emb_base": config.rope.theta,
        **write_rope(config.rope, partial=True),
    }


_LAYER = "layers.{layer}"

GPT_NEOX = Family(
    model_type="gpt_neox",
    lm_class="GPTNeoXForCausalLM",
    score_class="GPTNeoXForSequenceClassification",
    prefix="gpt_neox.",
    trunk=(
        TensorRule(name="embed_in.weight", leaves=("token_embedding",)),
        *norm(f"{_LAYER}.input_layernorm", "layers/attention_norm"),
        *norm(f"{_LAYER}.post_attention_layernorm", "layers/mlp_norm"),
        *(
            dataclasses.replace(rule, block="head")
            for rule in linear(
                f"{_LAYER}.attention.query_key_value", "query", "key", "value"
            )
        ),
        *linear(f"{_LAYER}.attention.dense", "output"),
        *linear(f"{_LAYER}.mlp.dense_h_to_4h", "up"),
        *linear(f"{_LAYER}.mlp.dense_4h_to_h", "down"),
        *norm("final_layer_norm", "final_norm"),
    ),
    lm_head=dataclasses.replace(LM_HEAD, name="embed_out.weight"),
    buffers=re.compile(
        r"(gpt_neox\.)?layers\.\d+\.attention\."
        r"(bias|masked_bias|rotary_emb\.inv_freq)"
    ),
    read=read,
    write=write,
)

"""Phi-3, 3.5 and 4-mini: fused projections, sliding window, LongRoPE."""

from rlhf_jax.files.typed_fields import Fields, flag, number, optional_integer, section
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families.family import (
    ROTARY_BUFFERS,
    Family,
    TensorRule,
    linear,
    norm,
)
from rlhf_jax.models.families.fields import (
    activation,
    activation_name,
    llama_size_fields,
    llama_sizes,
    sliding,
)
from rlhf_jax.models.families.rope_fields import read_rope, write_rope
from rlhf_jax.models.rope import LongRopeScaling


def read(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `phi3`. Raises ValueError naming the field."""
    sizes = llama_sizes(fields)
    window = optional_integer(fields, "sliding_window")
    return DecoderConfig(
        family="phi3",
        **sizes,
        rope=read_rope(
            _with_todays_names(fields), share=1.0, kinds=("default", "longrope")
        ),
        activation=activation(fields, "hidden_act", "silu"),
        tie_embeddings=flag(fields, "tie_word_embeddings", default=False),
        norm_eps=number(fields, "rms_norm_eps", default=1e-5),
        **sliding(window, (True,) * sizes["num_layers"]),
    )


def write(config: DecoderConfig) -> Fields:
    """The fields that `read` reads."""
    scaling = config.rope.scaling
    original = config.max_positions
    if isinstance(scaling, LongRopeScaling):
        original = scaling.original_max_positions
    return {
        **llama_size_fields(config),
        "hidden_act": activation_name(config.activation),
        "sliding_window": config.sliding_window,
        "original_max_position_embeddings": original,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        **write_rope(config.rope, partial=True),
    }


def _with_todays_names(fields: Fields) -> Fields:
    """Early files use draft names for `longrope`."""
    place = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = dict(section(fields, place))
    for name in ("rope_type", "type"):
        if rope.get(name) in ("su", "yarn"):
            rope[name] = "longrope"
    return fields | {place: rope}


_LAYER = "layers.{layer}"

PHI3 = Family(
    model_type="phi3",
    lm_class="Phi3ForCausalLM",
    score_class="Phi3ForSequenceClassification",
    prefix="model.",
    trunk=(
        TensorRule(name="embed_tokens.weight", leaves=("token_embedding",)),
        *norm(f"{_LAYER}.input_layernorm", "layers/attention_norm"),
        *linear(f"{_LAYER}.self_attn.qkv_proj", "query", "key", "value"),
        *linear(f"{_LAYER}.self_attn.o_proj", "output"),
        *norm(f"{_LAYER}.post_attention_layernorm", "layers/mlp_norm"),
        *linear(f"{_LAYER}.mlp.gate_up_proj", "gate", "up"),
        *linear(f"{_LAYER}.mlp.down_proj", "down"),
        *norm("norm", "final_norm"),
    ),
    buffers=ROTARY_BUFFERS,
    read=read,
    write=write,
)

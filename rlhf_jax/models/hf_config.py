"""Fields of a Hugging Face `config.json` ↔ `DecoderConfig`, family by family.

Fields that would change what the network computes in a way it cannot express are
refused by name. Dropout rates are not read: the transformer has no dropout.
"""

import dataclasses
from typing import Any

from rlhf_jax.models.config import (
    DecoderConfig,
    Llama3RopeScaling,
    gpt2_config,
    llama_config,
)

Fields = dict[str, Any]


def read_gpt2(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `gpt2`. Raises ValueError naming the field."""
    _expect(fields, "quantization_config", None)
    _expect(fields, "activation_function", "gelu_new", "gelu_pytorch_tanh")  # same
    _expect(fields, "scale_attn_weights", True)
    _expect(fields, "scale_attn_by_inverse_layer_idx", False)
    _expect(fields, "add_cross_attention", False)
    width = _integer(fields, "n_embd")
    config = gpt2_config(
        vocab_size=_integer(fields, "vocab_size"),
        max_positions=_integer(fields, "n_positions"),
        width=width,
        num_layers=_integer(fields, "n_layer"),
        num_heads=_integer(fields, "n_head"),
    )
    return dataclasses.replace(
        config,
        mlp_width=_integer(fields, "n_inner", default=4 * width),
        tie_embeddings=_flag(fields, "tie_word_embeddings", default=True),
        norm_eps=_number(fields, "layer_norm_epsilon", default=1e-5),
        initializer_range=_number(fields, "initializer_range", default=0.02),
    )


def write_gpt2(config: DecoderConfig) -> Fields:
    """The fields that `read_gpt2` reads."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def read_llama(fields: Fields) -> DecoderConfig:
    """`config.json` of model type `llama`. Raises ValueError naming the field."""
    _expect(fields, "quantization_config", None)
    _expect(fields, "hidden_act", "silu", "swish")  # two names of one function
    biases = _flag(fields, "attention_bias", default=False)
    if _flag(fields, "mlp_bias", default=False) != biases:
        raise ValueError(
            f"attention_bias={biases} with mlp_bias={not biases} is not supported; "
            "the two must be equal"
        )
    width = _integer(fields, "hidden_size")
    num_heads = _integer(fields, "num_attention_heads")
    rope_theta, rope_scaling = _read_rope(fields)
    config = llama_config(
        vocab_size=_integer(fields, "vocab_size"),
        max_positions=_integer(fields, "max_position_embeddings"),
        width=width,
        num_layers=_integer(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_integer(fields, "num_key_value_heads", default=num_heads),
        mlp_width=_integer(fields, "intermediate_size"),
        tie_embeddings=_flag(fields, "tie_word_embeddings", default=False),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
    )
    return dataclasses.replace(
        config,
        head_dim=_integer(fields, "head_dim", default=width // num_heads),
        attention_bias=biases,
        projection_bias=biases,
        norm_eps=_number(fields, "rms_norm_eps", default=1e-6),
        initializer_range=_number(fields, "initializer_range", default=0.02),
    )


def write_llama(config: DecoderConfig) -> Fields:
    """The fields that `read_llama` reads.

    Rotary positions are written twice: transformers 5 reads `rope_parameters`,
    transformers 4 reads `rope_theta` and `rope_scaling`.
    """
    scaling = config.rope_scaling
    rope: Fields = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": float(scaling.factor),
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.projection_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope | {"rope_theta": float(config.rope_theta)},
        "rope_theta": float(config.rope_theta),
        "rope_scaling": None if scaling is None else rope,
    }


def _read_rope(fields: Fields) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from either place."""
    place = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = {k: v for k, v in (fields.get(place) or {}).items() if v is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type={kind!r} in {place} is not supported; supported: 'default' or "
            "'llama3'"
        )
    _expect(fields, "partial_rotary_factor", None, 1.0)
    theta = _number(fields, "rope_theta", default=10_000.0)
    theta = _number(rope, "rope_theta", default=theta)
    rope.pop("rope_theta", None)
    scaling = None
    if kind == "llama3":
        length = _integer(fields, "max_position_embeddings")
        length = _integer(rope, "original_max_position_embeddings", default=length)
        rope.pop("original_max_position_embeddings", None)
        # Which of two different lengths wins depends on the version of transformers.
        _expect(fields, "original_max_position_embeddings", None, length)
        scaling = Llama3RopeScaling(
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_max_positions=length,
        )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            del rope[name]
    if rope:
        raise ValueError(
            f"{place} has {sorted(rope)}, which is not supported with "
            f"rope_type={kind!r}"
        )
    return theta, scaling


def _expect(fields: Fields, name: str, *supported: Any) -> None:
    """Refuses any other value; an absent field has the first one."""
    value = fields.get(name, supported[0])
    if value not in supported:
        raise ValueError(
            f"{name}={value!r} is not supported; supported: "
            f"{' or '.join(map(repr, supported))}"
        )


def _integer(fields: Fields, name: str, default: int | None = None) -> int:
    """A positive integer; `default`, where there is one, if absent or null."""
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    return value


def _number(fields: Fields, name: str, default: float | None = None) -> float:
    """A positive number; `default`, where there is one, if absent or null."""
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def _flag(fields: Fields, name: str, *, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value

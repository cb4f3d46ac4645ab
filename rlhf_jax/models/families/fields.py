"""Reads fields of a `config.json` and rejects unsupported values.

Unsupported fields that would change the computation are rejected by name. Dropout rates
are ignored: the transformer has no dropout.
"""

import math
from typing import Any

from rlhf_jax.models.config import Activation, DecoderConfig

Fields = dict[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def expect(fields: Fields, name: str, *supported: Any) -> None:
    """Rejects any other value; a missing field has the first one."""
    value = fields.get(name, supported[0])
    if value not in supported:
        raise ValueError(
            f"{name}={value!r} is not supported; supported: "
            f"{' or '.join(map(repr, supported))}"
        )


def integer(fields: Fields, name: str, default: int | None = None) -> int:
    """A positive integer; `default`, if given, when missing or null."""
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    return value


def optional_integer(fields: Fields, name: str) -> int | None:
    """A positive integer, or None if missing or null."""
    return None if fields.get(name) is None else integer(fields, name)


def number(fields: Fields, name: str, default: float | None = None) -> float:
    """A positive number; `default`, if given, when missing or null."""
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def optional_number(
    fields: Fields, name: str, default: float | None = None
) -> float | None:
    """A positive number, `default` if missing, or None if null."""
    value = fields.get(name, default)
    return None if value is None else number({name: value}, name)


def flag(fields: Fields, name: str, *, default: bool) -> bool:
    """True or false."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def activation(fields: Fields, name: str, default: str) -> Activation:
    """The activation function of the MLP."""
    value = fields.get(name) or default
    if value not in _ACTIVATIONS:
        raise ValueError(
            f"{name}={value!r} is not supported; supported: "
            f"{' or '.join(map(repr, _ACTIVATIONS))}"
        )
    return _ACTIVATIONS[value]


def activation_name(activation: Activation) -> str:
    """Its name in `config.json`."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def llama_sizes(fields: Fields) -> dict[str, Any]:
    """Our configuration fields from those shared by Llama-like families."""
    width = integer(fields, "hidden_size")
    num_heads = integer(fields, "num_attention_heads")
    return {
        "vocab_size": integer(fields, "vocab_size"),
        "max_positions": integer(fields, "max_position_embeddings"),
        "width": width,
        "num_layers": integer(fields, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": integer(fields, "num_key_value_heads", default=num_heads),
        "head_dim": integer(fields, "head_dim", default=max(width // num_heads, 1)),
        "mlp_width": integer(fields, "intermediate_size"),
        "initializer_range": number(fields, "initializer_range", default=0.02),
    }


def llama_size_fields(config: DecoderConfig) -> Fields:
    """The fields that `llama_sizes` reads."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
    }


def read_layer_types(fields: Fields, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers have a sliding window; `default` if not in the file."""
    types = fields.get("layer_types")
    if types is None:
        return default
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or not all(kind in known for kind in types):
        raise ValueError(
            f"layer_types is {types!r}; it must list 'full_attention' or "
            "'sliding_attention' for each layer"
        )
    return tuple(known[kind] for kind in types)


def write_layer_types(config: DecoderConfig) -> list[str]:
    """The field that `read_layer_types` reads."""
    sliding = config.sliding_layers or (False,) * config.num_layers
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def sliding(window: int | None, layers: tuple[bool, ...]) -> dict[str, Any]:
    """Window and layers for our configuration; both empty if either is."""
    if window is None or not any(layers):
        return {}
    return {"sliding_window": window, "sliding_layers": layers}

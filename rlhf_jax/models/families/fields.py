"""Reads fields of a `config.json` and rejects unsupported values.

Unsupported fields that would change the computation are rejected by name. Dropout rates
are ignored: the transformer has no dropout.
"""

from typing import Any

from rlhf_jax.files.printable import shown
from rlhf_jax.files.typed_fields import Fields, integer, number
from rlhf_jax.models.config import Activation, DecoderConfig

MOST_LAYERS = 1000
MOST_SIZE = 2**24

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
            f"{name}={shown(value)} is not supported; supported: "
            f"{' or '.join(map(shown, supported))}"
        )


def size(fields: Fields, name: str, default: int | None = None) -> int:
    """A positive integer that can be an axis of a tensor."""
    return integer(fields, name, default, most=MOST_SIZE)


def layers(fields: Fields, name: str) -> int:
    """The number of blocks."""
    return integer(fields, name, most=MOST_LAYERS)


def activation(fields: Fields, name: str, default: str) -> Activation:
    """The activation function of the MLP."""
    value = fields.get(name) or default
    expect({name: value}, name, *_ACTIVATIONS)
    return _ACTIVATIONS[value]


def activation_name(activation: Activation) -> str:
    """Its name in `config.json`."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def llama_sizes(fields: Fields) -> dict[str, Any]:
    """Our configuration fields from those shared by Llama-like families."""
    width = size(fields, "hidden_size")
    num_heads = size(fields, "num_attention_heads")
    return {
        "vocab_size": size(fields, "vocab_size"),
        "max_positions": integer(fields, "max_position_embeddings"),
        "width": width,
        "num_layers": layers(fields, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": size(fields, "num_key_value_heads", default=num_heads),
        "head_dim": size(fields, "head_dim", default=max(width // num_heads, 1)),
        "mlp_width": size(fields, "intermediate_size"),
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
    if not isinstance(types, list) or not all(
        isinstance(kind, str) and kind in known for kind in types
    ):
        raise ValueError(
            f"layer_types is {shown(types)}; it must list 'full_attention' or "
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

"""Rotary positions in a `config.json` of transformers 4 or 5."""

import math
from typing import Any

from rlhf_jax.files.printable import shown
from rlhf_jax.files.typed_fields import (
    Fields,
    flag,
    integer,
    number,
    optional_number,
    section,
)
from rlhf_jax.models.families.fields import expect
from rlhf_jax.models.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnRopeScaling,
)

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(
    fields: Fields,
    *,
    theta: float = 10_000.0,
    share: float | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> Rope:
    """Base, share and scaling of the rotary frequencies, from any supported location.

    Args:
        fields: of `config.json`.
        theta: default base.
        share: default share of a head that is rotated; None: the family always rotates
            all of it.
        kinds: scaling types of the family.

    Raises:
        ValueError: naming the unsupported field.
    """
    place = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = {k: v for k, v in section(fields, place).items() if v is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)  # older files have both
    if kind not in kinds:
        raise ValueError(
            f"rope_type={shown(kind)} in {place} is not supported; supported: "
            f"{' or '.join(map(shown, kinds))}"
        )
    theta = number(fields, "rope_theta", default=theta)
    theta = number(rope, "rope_theta", default=theta)
    if share is None:
        expect(fields, "partial_rotary_factor", None, 1.0)
        expect(rope, "partial_rotary_factor", None, 1.0)
    share = number(fields, "partial_rotary_factor", default=share or 1.0)
    share = number(rope, "partial_rotary_factor", default=share)
    if share > 1.0:
        raise ValueError(f"partial_rotary_factor={share}; it must be in (0, 1]")
    scaling = _READERS[kind](rope, fields) if kind in _READERS else None
    left = rope.keys() - {"rope_theta", "partial_rotary_factor"} - _USED[kind]
    if left:
        raise ValueError(
            f"{place} has {shown(sorted(left))}, which is not supported with "
            f"rope_type={shown(kind)}"
        )
    return Rope(theta=theta, share=share, scaling=scaling)


def write_rope(rope: Rope, *, partial: bool = False) -> Fields:
    """The fields that `read_rope` reads.

    Written twice: transformers 5 reads `rope_parameters`, transformers 4 reads
    `rope_theta` and `rope_scaling`.

    Args:
        rope: to write.
        partial: the family may rotate only a share of a head, given in its files.
    """
    scaling = write_scaling(rope.scaling)
    inner = scaling | {"rope_theta": float(rope.theta)}
    fields: Fields = {
        "rope_theta": float(rope.theta),
        "rope_scaling": None if rope.scaling is None else scaling,
    }
    if partial:
        inner["partial_rotary_factor"] = rope.share
        fields["partial_rotary_factor"] = rope.share
    return fields | {"rope_parameters": inner}


def write_scaling(scaling: RopeScaling | None) -> Fields:
    """`rope_type` and its parameters."""
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearRopeScaling():
            return {"rope_type": "linear", "factor": float(scaling.factor)}
        case DynamicRopeScaling():
            return {"rope_type": "dynamic", "factor": float(scaling.factor)}
        case Llama3RopeScaling():
            return {
                "rope_type": "llama3",
                "factor": float(scaling.factor),
                "low_freq_factor": float(scaling.low_freq_factor),
                "high_freq_factor": float(scaling.high_freq_factor),
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case YarnRopeScaling():
            return {
                "rope_type": "yarn",
                "factor": float(scaling.factor),
                "original_max_position_embeddings": scaling.original_max_positions,
                "attention_factor": float(scaling.attention_factor),
                "beta_fast": float(scaling.beta_fast),
                "beta_slow": float(scaling.beta_slow),
                "truncate": scaling.truncate,
            }
        case LongRopeScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
                "original_max_position_embeddings": scaling.original_max_positions,
                "attention_factor": float(scaling.attention_factor),
            }


def _read_linear(rope: Fields, fields: Fields) -> LinearRopeScaling:
    return LinearRopeScaling(factor=number(rope, "factor"))


def _read_dynamic(rope: Fields, fields: Fields) -> DynamicRopeScaling:
    # transformers always scales the base from max_position_embeddings on.
    length = integer(fields, "max_position_embeddings")
    expect(rope, "original_max_position_embeddings", length)
    return DynamicRopeScaling(
        factor=number(rope, "factor"), original_max_positions=length
    )


def _read_llama3(rope: Fields, fields: Fields) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=number(rope, "factor"),
        low_freq_factor=number(rope, "low_freq_factor"),
        high_freq_factor=number(rope, "high_freq_factor"),
        original_max_positions=_original_length(rope, fields),
    )


def _read_yarn(rope: Fields, fields: Fields) -> YarnRopeScaling:
    factor = number(rope, "factor")
    attention = optional_number(rope, "attention_factor")
    if attention is None:
        mscale = optional_number(rope, "mscale")
        mscale_all = optional_number(rope, "mscale_all_dim")
        attention = _yarn_attention(factor, 1.0)
        if mscale and mscale_all:
            attention = _yarn_attention(factor, mscale)
            attention /= _yarn_attention(factor, mscale_all)
    return YarnRopeScaling(
        factor=factor,
        original_max_positions=_original_length(rope, fields),
        attention_factor=attention,
        beta_fast=number(rope, "beta_fast", default=32.0),
        beta_slow=number(rope, "beta_slow", default=1.0),
        truncate=flag(rope, "truncate", default=True),
    )


def _yarn_attention(factor: float, scale: float) -> float:
    """Peng et al., 2023, section 3.4: 0.1 · ln(factor) + 1."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _read_longrope(rope: Fields, fields: Fields) -> LongRopeScaling:
    original = _original_length(rope, fields)
    integer({_LENGTH: original}, _LENGTH, least=2)  # its logarithm is a divisor
    whole = integer(fields, "max_position_embeddings")
    factor = number(rope, "factor", default=whole / original)
    attention = optional_number(rope, "attention_factor")
    if attention is None:  # Ding et al., 2024, section 3.3
        grown = math.sqrt(1 + math.log(factor) / math.log(original))
        attention = grown if factor > 1.0 else 1.0
    return LongRopeScaling(
        short_factor=_factors(rope, "short_factor"),
        long_factor=_factors(rope, "long_factor"),
        original_max_positions=original,
        attention_factor=attention,
    )


def _factors(rope: Fields, name: str) -> tuple[float, ...]:
    value: Any = rope.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {shown(value)}: give a list of numbers")
    return tuple(number({name: x}, name) for x in value)


def _original_length(rope: Fields, fields: Fields) -> int:
    """The training length before scaling."""
    length = integer(fields, "max_position_embeddings")
    beside = integer(fields, "original_max_position_embeddings", default=length)
    inside = integer(rope, "original_max_position_embeddings", default=beside)
    if "original_max_position_embeddings" in fields and beside != inside:
        # Which of two different lengths is used depends on the transformers version.
        raise ValueError(
            f"original_max_position_embeddings={beside} is not supported with {inside} "
            "inside the rotary parameters; give one of them"
        )
    return inside


_READERS = {
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
}
_LENGTH = "original_max_position_embeddings"
_USED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", _LENGTH},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "yarn": {
        *("factor", "attention_factor", "mscale", "mscale_all_dim"),
        *("beta_fast", "beta_slow", "truncate", _LENGTH),
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", _LENGTH},
}

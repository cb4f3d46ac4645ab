"""Families of Hugging Face checkpoints: one file each, and the table of them."""

from rlhf_jax.models.families.family import LM_HEAD, SCORE, Family, TensorRule
from rlhf_jax.models.families.table import (
    FAMILIES,
    config_fields,
    family_of,
    read_config,
)

__all__ = [
    "FAMILIES",
    "LM_HEAD",
    "SCORE",
    "Family",
    "TensorRule",
    "config_fields",
    "family_of",
    "read_config",
]

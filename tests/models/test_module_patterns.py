"""Patterns of modules mean what they mean to PEFT, as far as they are supported."""

import re

import pytest

from rlhf_jax.models.hf.module_patterns import ModulePatterns

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.self_attn.my_q_proj",
    "model.layers.1.mlp.up_proj",
    "transformer.h.1.attn.c_attn",
]
PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    r"self_attn\.q_proj",
    "attn.q_proj",
    "^model.layers.1.mlp.up_proj",
    "^layers.1.mlp.up_proj",
    "up_proj$",
    r"layers\.1.*",
    r"layers\.\d+\.mlp\.up_proj",
    r"layers\.[0-9]+\.self_attn\.q_proj",
    ".*_proj",
    "c_attn",
]


def theirs(patterns, module):
    """The documented rule of PEFT: the first that matches the end of the name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_pattern(pattern):
    ours = ModulePatterns("alpha_pattern", {pattern: 2.0})
    for module in MODULES:
        assert ours.find(module) == theirs({pattern: 2.0}, module), module


def test_the_first_of_several_counts():
    for patterns in (PATTERNS, PATTERNS[::-1]):
        values = {pattern: float(i) for i, pattern in enumerate(patterns)}
        ours = ModulePatterns("alpha_pattern", values)
        for module in MODULES:
            assert ours.find(module) == theirs(values, module), module

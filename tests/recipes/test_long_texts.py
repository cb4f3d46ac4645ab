"""Rotary positions that depend on the length of a text, where a policy is sampled."""

import dataclasses

import pytest

from rlhf_jax.models import load_tokenizer, save_pretrained
from rlhf_jax.models.rope import LongRopeScaling, Rope
from rlhf_jax.models.tiny import tiny_llama
from rlhf_jax.recipes import ppo


def test_policy_that_would_be_sampled_and_trained_at_other_angles(stages, tmp_path):
    tokenizer = load_tokenizer(stages.ppo.policy)
    module, params = tiny_llama(vocab_size=len(tokenizer), max_positions=96)
    scaling = LongRopeScaling(
        short_factor=(1.0,) * 4,
        long_factor=(2.0,) * 4,
        original_max_positions=20,
        attention_factor=1.1,
    )
    config = dataclasses.replace(module.config, rope=Rope(scaling=scaling))
    save_pretrained(
        tmp_path / "policy", module.clone(config=config), params, tokenizer=tokenizer
    )
    run = dataclasses.replace(
        stages.ppo, policy=str(tmp_path / "policy"), run_dir=str(tmp_path / "run")
    )
    with pytest.raises(ValueError, match=r"depends on the text length beyond 20, so"):
        ppo.run(run)

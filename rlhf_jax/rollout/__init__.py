"""From prompts to experience: sampling, scoring, reward shaping."""

from rlhf_jax.rollout.decoding import generate
from rlhf_jax.rollout.experience import make_experience
from rlhf_jax.rollout.from_logits import (
    token_logprobs_from_logits,
    uncached_decoding,
    values_from_sequence,
)
from rlhf_jax.rollout.group_experience import make_group_experience
from rlhf_jax.rollout.scoring import score_rollout

__all__ = [
    "generate",
    "make_experience",
    "make_group_experience",
    "score_rollout",
    "token_logprobs_from_logits",
    "uncached_decoding",
    "values_from_sequence",
]

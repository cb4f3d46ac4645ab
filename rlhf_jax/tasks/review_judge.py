"""The true reward of reviews as a reward function, for `--eval-reward`.

`rlhf_jax.tasks.review_judge:true_reward` is the only thing to look at in the end: to
measure what a reward model is worth, or to stop a run in time. Training on it would
leave nothing to learn from the reward model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.tasks.review_reward import true_rewards


def true_reward(
    prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Any]
) -> list[float]:
    """`review_reward.true_reward` of each answer.

    Args:
        prompts: B review prompts.
        responses: B answers.
        columns: of the rows; not read.

    Returns:
        B numbers from -5 to 3.9.

    Raises:
        ValueError: if a prompt is not a review prompt.
    """
    return true_rewards(prompts, responses).tolist()

"""The true reward of reviews as a reward function, for `--eval-reward`.

Use `rlhf_jax.tasks.review_judge:true_reward` to evaluate a reward model or for early
stopping. Training on it would make the reward model unnecessary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.tasks.review_reward import true_rewards


def true_reward(
    prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Any]
) -> list[float]:
    """`review_reward.true_reward` of each response.

    Args:
        prompts: B review prompts.
        responses: B responses.
        columns: of the rows; unused.

    Returns:
        B numbers from -5 to 3.9.

    Raises:
        ValueError: if a prompt is not a review prompt.
    """
    return true_rewards(prompts, responses).tolist()

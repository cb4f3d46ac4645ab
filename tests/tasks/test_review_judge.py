"""The true reward of reviews, called as a reward function."""

import pytest

from rlhf_jax.rewards.functions import load_reward_function
from rlhf_jax.tasks.reviews import make_demonstrations, true_reward


def test_is_the_true_reward_of_each_row():
    rows = make_demonstrations(0, 5)
    judge = load_reward_function("rlhf_jax.tasks.review_judge:true_reward")
    prompts, responses = zip(*((r.prompt, r.response) for r in rows), strict=True)
    got = judge(list(prompts), list(responses), {"other": [1] * 5})
    assert got == [true_reward(*pair) for pair in zip(prompts, responses, strict=True)]
    assert all(type(score) is float for score in got)
    assert len(set(got)) > 1


def test_another_prompt_is_refused():
    judge = load_reward_function("rlhf_jax.tasks.review_judge:true_reward")
    with pytest.raises(ValueError, match="is not a review prompt"):
        judge(["What is 2 + 2?"], [" 4"], {})

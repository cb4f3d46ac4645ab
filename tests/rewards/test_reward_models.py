"""Reward models of texts, against one answer at a time without padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models import load_pretrained
from rlhf_jax.models.callables import reward_model
from rlhf_jax.rewards.functions import load_reward_function
from rlhf_jax.rewards.reward_models import RewardJudge

PROMPTS = ["Review of the film The Silent Harbour:", "Review of the game The Red Door:"]
RESPONSES = [
    " The plot was superb.",
    " I liked it. In short, a fine and gripping game.",
]


def one_at_a_time(path):
    module, params = load_pretrained(path, head="reward")
    tokenization, score = Tokenization.load(str(path)), reward_model(module)
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = [tokenization.tokenizer(text)["input_ids"] for text in (prompt, response)]
        tokens = jnp.array([[*ids[0], *ids[1], tokenization.eos_id]])
        found.append(float(score(params, tokens, jnp.ones_like(tokens, bool))[0]))
    return found


def test_scores_and_their_ensemble(stages, tmp_path):
    path = f"{stages.reward.run_dir}/model"
    judge = RewardJudge([path, path], how="mean", batch_size=3)
    want = one_at_a_time(path)
    assert want[0] != pytest.approx(want[1], abs=1e-3)
    np.testing.assert_allclose(
        judge.scores(PROMPTS, RESPONSES), [want, want], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        judge(PROMPTS, RESPONSES, {}), want, rtol=1e-4, atol=1e-5
    )

    code = "from rlhf_jax.rewards.reward_models import RewardJudge\n"
    (tmp_path / "judge.py").write_text(f"{code}judged = RewardJudge([{path!r}])\n")
    function = load_reward_function(f"{tmp_path / 'judge.py'}:judged")
    np.testing.assert_allclose(
        function(PROMPTS, RESPONSES, {}), want, rtol=1e-4, atol=1e-5
    )


def test_no_models():
    with pytest.raises(ValueError, match=r"paths=\[\]: name at least one"):
        RewardJudge([])

import jax
import numpy as np
import pytest

from rlhf_jax.models import with_head
from rlhf_jax.models.heads import fresh_score
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama


def test_reward_model_from_a_language_model():
    module, params = tiny_llama()
    reward, with_score = with_head(module, params, "reward", key=jax.random.key(0))
    assert reward.head == "reward"
    assert with_score.keys() == (params.keys() - {"output_embedding"}) | {"score"}
    assert with_score["layers"] is params["layers"]
    assert "output_embedding" in params  # the argument is not changed


def test_critic_has_the_parameters_of_the_reward_model():
    module, params = tiny_llama("reward")
    critic, same = with_head(module, params, "value")
    assert critic == module.clone(head="value")
    assert same == params  # the same arrays: comparing others would raise


def test_a_fresh_score_needs_a_key():
    with pytest.raises(ValueError, match=r"head='value' .* pass key="):
        with_head(*tiny_gpt2(), "value")


def test_back_to_a_language_model():
    module, params = tiny_gpt2("reward")
    again, trunk = with_head(module, params, "lm")
    assert again == tiny_gpt2()[0]
    assert trunk.keys() == params.keys() - {"score"}
    with pytest.raises(ValueError, match="head='lm' needs an output matrix"):
        with_head(*tiny_llama("reward"), "lm")


def test_fresh_scores_have_variance_one_over_width_plus_one():
    # 4 standard errors: the standard deviation of D draws is known to 1 / √(2 D).
    scale = jax.numpy.ones(40_000, jax.numpy.bfloat16)
    score = fresh_score(scale, jax.random.key(0))
    assert score.dtype == jax.numpy.bfloat16
    score = np.asarray(score, np.float64)
    np.testing.assert_allclose(score.std() * 40_001**0.5, 1.0, atol=4 / 80_000**0.5)
    assert abs(score.mean()) * 40_001**0.5 < 4 / 40_000**0.5

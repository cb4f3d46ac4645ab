"""Presets through the whole recipe; options that act where models are loaded."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import cli
from rlhf_jax.algo.options import KLOptions, ScoreOptions
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import ppo
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.policy_models import load_four_models
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.log_files import read_metrics

METHOD = {"epochs": 2, "minibatches": 2}


def flags_of(config, run_dir):
    """What a user types: models, data and sizes, but no method."""
    return [
        *("--policy", config.policy, "--reward-model", config.reward_model),
        *("--data", config.data, "--run-dir", str(run_dir)),
        *("--eval-fraction", "0.2", "--eval-prompts", "8", "--eval-every", "2"),
        *("--updates", "2", "--batch-size", "8", "--max-new-tokens", "12", "--quiet"),
    ]


@pytest.mark.parametrize("name", PPO_PRESETS)
def test_a_preset_trains(stages, tmp_path, name):
    run_dir = tmp_path / name
    flags = ["--preset", name, *flags_of(stages.ppo, run_dir)]
    # Large steps, so that two of them show in the parameters.
    flags += ["--actor-optimizer.learning-rate", "0.01"]
    config = cli.parse(PPOConfig, flags, prog="rlhf-jax ppo")
    assert config.kl == PPO_PRESETS[name]().kl
    run = ppo.run(config)
    first, second = read_metrics(run.metrics)[1:]
    for row in (first, second):
        assert row["policy/first_clip_fraction"] == 0.0
        assert row["policy/first_approx_kl"] < 1e-6
        assert np.isfinite(row["value/loss"])
    assert ("kl/sequence" in first) == (config.kl.place != "none")
    _, before = load_pretrained(Path(config.policy))
    _, after = load_pretrained(run.model)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_fixed_length_answers_are_trained_on_to_their_end(stages, tmp_path):
    config = dataclasses.replace(
        stages.ppo, run_dir=str(tmp_path / "run"), after_stop="keep", updates=1
    )
    row = read_metrics(ppo.run(config).metrics)[1]
    assert row["response/length_mean"] == config.max_new_tokens
    assert 0.0 <= row["response/stop_rate"] < 1.0


def test_a_target_without_a_kl_is_a_run_without_a_kl(stages, tmp_path):
    """`--preset openai_2019 --kl.place none`: the preset's target stays behind."""
    config = dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path / "run"),
        kl=KLOptions(place="none", target=6.0),
        updates=2,
    )
    rows = read_metrics(ppo.run(config).metrics)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert not {name for row in rows for name in row if name.startswith("kl/")}


def critic_values(config):
    """The actor-critic's values of one text before training, and its models."""
    models, params = load_four_models(config, Networks(config, make_mesh()))
    tokens = jnp.arange(20)[None] + 5
    logprobs, _, values = models.forward(
        params, tokens, tokens > 0, response_length=12, temperature=1.0
    )
    alone = models.values_fn(
        models.critic_of(params), tokens, tokens > 0, response_length=12
    )
    np.testing.assert_allclose(values, alone, rtol=1e-5, atol=1e-6)
    of_policy = models.policy.token_logprobs(
        params.actor, tokens, tokens > 0, response_length=12, temperature=1.0
    )
    np.testing.assert_allclose(logprobs, of_policy[0], rtol=1e-5, atol=1e-6)
    return np.asarray(values), params


def test_where_the_critic_comes_from(stages):
    loaded, params = critic_values(stages.ppo)
    assert np.abs(loaded).max() > 1e-3
    assert "layers" in params.critic
    shared = dataclasses.replace(stages.ppo, critic_trunk="shared")
    values, params = critic_values(shared)
    assert set(params.critic) == {"score"}
    assert np.abs(values - loaded).max() > 1e-3
    # A fresh head of deviation 1/√(D+1) on normalised states: values of size one.
    assert 0.1 < np.std(values) < 10


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_the_critics_head(stages, trunk):
    config = dataclasses.replace(stages.ppo, critic_trunk=trunk, critic_head_std=0.0)
    assert not np.any(critic_values(config)[0])
    config = dataclasses.replace(config, critic_head_std=0.5)
    _, params = critic_values(config)
    # 32 numbers: their deviation is within three standard errors of 0.5.
    assert abs(np.std(params.critic["score"]) - 0.5) < 3 * 0.5 / np.sqrt(2 * 32)


def test_a_language_model_may_be_the_critics_start(stages):
    config = dataclasses.replace(stages.ppo, critic=stages.ppo.policy)
    values, params = critic_values(config)
    assert params.critic["score"].shape == (32,)
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"critic": "x", "critic_trunk": "shared"}, "critic='x'"),
        ({"max_update_kl": 0.0}, "max-update-kl=0.0"),
        ({"critic_head_std": -1.0}, "critic-head-std=-1.0"),
        ({"critic_warmup": -1}, "critic-warmup=-1"),
    ],
)
def test_values_that_cannot_work(stages, changes, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(stages.ppo, **changes).validate()


def test_scores_of_the_reference_are_read_as_in_training(stages, tmp_path):
    """The moments are those of the scores that training sees: through the stop."""
    config = dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path / "run"),
        after_stop="keep",
        stop=(".",),
        updates=2,
        scores=ScoreOptions(normalization="reference"),
        # Nothing moves: the policy that answers in training is the reference.
        actor_optimizer=dataclasses.replace(
            stages.ppo.actor_optimizer, learning_rate=0.0
        ),
    )
    rows = read_metrics(ppo.run(config).metrics)
    mean, std = (rows[1][f"reward/normalization_{name}"] for name in ("mean", "std"))
    assert rows[2]["reward/normalization_mean"] == mean
    # Means of 32, 8 and 10 answers of one policy: within 4 standard errors.
    assert abs(rows[1]["reward/score_mean"] - mean) < 4 * std * (1 / 32 + 1 / 8) ** 0.5
    assert abs(rows[0]["eval/score_mean"] - mean) < 4 * std * (1 / 32 + 1 / 10) ** 0.5
    # Evaluation stops where answers stop, training goes on to the limit.
    assert rows[0]["eval/length_mean"] < config.max_new_tokens
    assert rows[1]["response/length_mean"] == config.max_new_tokens


def test_warm_up_leaves_the_policy_its_whole_schedule(stages, tmp_path):
    config = dataclasses.replace(
        stages.ppo, run_dir=str(tmp_path / "run"), updates=4, critic_warmup=2
    )
    rows = read_metrics(ppo.run(config).metrics)[1:]
    actor = [row["optim/actor_learning_rate"] for row in rows]
    critic = [row["optim/critic_learning_rate"] for row in rows]
    # 2 · 2 steps per update. One warm-up step, then linearly from the peak to 0.
    peak = config.actor_optimizer.learning_rate
    warm_up = 0  # 5 % of 8 steps
    first = peak * (1 - (0 - warm_up) / 8)
    np.testing.assert_allclose(actor, [first, first, first, peak * 0.5], rtol=1e-5)
    assert critic[0] != critic[1] != critic[2]

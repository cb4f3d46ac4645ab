"""Where the reward of a run comes from, with PPO and without a critic."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import grpo, ppo
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.policy_models import load_four_models
from rlhf_jax.rewards.functions import RewardError
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.log_files import read_metrics, read_samples

NO_FUNCTION = {"reward": (), "reward_processes": 2}


def samples_before_training(run):
    return [row for row in read_samples(run.samples) if row["step"] == 0]


def column(rows, name):
    return np.array([row[name] for row in rows])


@pytest.fixture(scope="module")
def judged(grpo_config, stages, tmp_path_factory):
    """Runs one update with other sources of reward; the answers are always the same."""
    root = tmp_path_factory.mktemp("judged")

    def run(name, **changes):
        config = dataclasses.replace(
            grpo_config,
            **{"reward_model": stages.ppo.reward_model, "updates": 1, **changes},
            run_dir=str(root / name),
        )
        return grpo.run(config)

    return run


@pytest.fixture(scope="module")
def by_model(judged):
    """A run with a reward model alone."""
    return judged("model", **NO_FUNCTION)


@pytest.fixture(scope="module")
def opponent(stages, tmp_path_factory):
    """The reward model with its head negated: s becomes −s."""
    path = tmp_path_factory.mktemp("opponent") / "model"
    shutil.copytree(stages.ppo.reward_model, path)
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = -tensors["score.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def test_a_reward_model_alone(by_model):
    rows = samples_before_training(by_model)
    assert set(rows[0]) == {"step", "prompt", "response", "score", "kl"}
    assert np.std(column(rows, "score")) > 1e-3
    first, last = read_metrics(by_model.metrics)
    assert not any("pass_at" in name for name in first)
    assert not any(name.startswith("eval/reward/") for name in first)
    assert "reward/model" not in last


def test_functions_beside_a_reward_model_are_a_weighted_sum(
    judged, by_model, grpo_config
):
    brevity = grpo_config.reward[0].replace(":letters", ":brevity")
    run = judged(
        "sum",
        reward=(*grpo_config.reward, brevity),
        reward_weights=(2.0, -0.5),
        reward_model_weight=0.25,
    )
    rows, alone = samples_before_training(run), samples_before_training(by_model)
    assert [row["response"] for row in rows] == [row["response"] for row in alone]
    letters = np.array([row["response"].count("e") for row in rows])
    lengths = np.array([len(row["response"]) for row in rows])
    want = 0.25 * column(alone, "score") + 2 * letters - 0.5 * (-lengths / 10)
    np.testing.assert_allclose(column(rows, "score"), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(column(rows, "letters"), letters)
    np.testing.assert_allclose(column(rows, "brevity"), -lengths / 10, rtol=1e-6)

    # The same sum in training, where the first answers are the same as well.
    trained, by_model_alone = (read_metrics(x.metrics)[1] for x in (run, by_model))
    model = by_model_alone["reward/score_mean"]
    np.testing.assert_allclose(trained["reward/model"], model, rtol=1e-4, atol=1e-6)
    functions = 2 * trained["reward/letters"] - 0.5 * trained["reward/brevity"]
    want = 0.25 * model + functions
    np.testing.assert_allclose(trained["reward/score_mean"], want, rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "score"), [(1e20, r"-?\d\S*e\+(19|20)"), (3e38, r"(-?inf|nan)")]
)
def test_a_reward_model_with_unusable_scores_is_named(
    judged, stages, grpo_config, tmp_path, scale, score
):
    path = tmp_path / "model"
    shutil.copytree(stages.ppo.reward_model, path)
    tensors = load_file(path / "model.safetensors")
    head = tensors["score.weight"]
    tensors["score.weight"] = head / np.abs(head).max() * np.float32(scale)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name, functions in (("alone", NO_FUNCTION), ("sum", {})):
        message = (
            rf'^the reward of row \d+ \(response ".*"\) is {score}, with {score} from '
            r"the reward model times reward-model-weight=1; both go from -1e\+12 to "
            rf"1e\+12: repair the model at reward-model='{path}', or lower the weight$"
        )
        with pytest.raises(RewardError, match=message):
            judged(f"{scale}-{name}", **functions, reward_model=str(path))


def test_a_weight_that_makes_the_sum_too_large_is_named(judged):
    message = (
        r"is -?\d\S*e\+12, with -?\d\S* from the reward model times reward-model-weight"
    )
    with pytest.raises(RewardError, match=message):
        judged("weight", **NO_FUNCTION, reward_model_weight=1e12)


def test_the_worst_of_an_ensemble(judged, by_model, opponent):
    run = judged("worst", **NO_FUNCTION, ensemble=(opponent,))
    score = column(samples_before_training(by_model), "score")
    worst = column(samples_before_training(run), "score")
    # min(s, −s) = −|s|
    np.testing.assert_allclose(worst, -np.abs(score), rtol=1e-4, atol=1e-6)
    assert (score > 0).any()


def test_an_ensemble_less_its_disagreement(judged, by_model, opponent):
    run = judged(
        "penalty",
        **NO_FUNCTION,
        ensemble=(opponent,),
        ensemble_score="mean-minus-std",
        ensemble_penalty=3.0,
    )
    score = column(samples_before_training(by_model), "score")
    got = column(samples_before_training(run), "score")
    # The mean of s and −s is 0, their deviation |s|.
    np.testing.assert_allclose(got, -3 * np.abs(score), rtol=1e-4, atol=1e-6)
    first, last = read_metrics(run.metrics)
    assert first["eval/score_mean"] < 0 and last["reward/score_mean"] < 0


# PPO with reward functions.


@pytest.fixture(scope="module")
def ppo_config(grpo_config, stages, tmp_path_factory):
    """The task of `grpo_config` and nothing but its reward."""
    return dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path_factory.mktemp("ppo") / "run"),
        reward_model=None,
        reward=grpo_config.reward,
        reward_processes=1,
        data=grpo_config.data,
        eval_prompts=8,
        eval_samples=4,
        eval_every=12,
        batch_size=16,
        updates=12,
        actor_optimizer=grpo_config.optimizer,
    )


def test_ppo_learns_what_a_function_pays_for(ppo_config):
    run = ppo.run(ppo_config)
    first, *_, last = read_metrics(run.metrics)
    assert last["eval/reward/letters"] > first["eval/reward/letters"] + 1
    assert last["eval/score_mean"] == last["eval/reward/letters"]
    assert last["eval/pass_at_4"] >= last["eval/pass_at_2"] >= last["eval/pass_at_1"]
    assert last["reward/letters"] == pytest.approx(last["reward/score_mean"])
    assert last["value/loss"] < 1e3
    assert "reward/model" not in last
    for row in read_samples(run.samples):
        assert row["score"] == row["letters"] == row["response"].count("e")


def test_the_critic_starts_from_the_policy_under_a_fresh_head(ppo_config):
    _, params = load_four_models(ppo_config, Networks(ppo_config, make_mesh()))
    _, policy = load_pretrained(Path(ppo_config.policy))
    critic = dict(params.critic)
    head = critic.pop("score")
    assert head.shape == (32,) and np.std(head) > 0.05
    jax.tree.map(
        np.testing.assert_array_equal, critic, {name: policy[name] for name in critic}
    )
    other = dataclasses.replace(ppo_config, seed=1)
    _, again = load_four_models(other, Networks(other, make_mesh()))
    assert not np.array_equal(again.critic["score"], head)


def test_ppo_keeps_its_best_policy_and_ends(ppo_config, tmp_path):
    """What never rises was best at the start; that policy is what the run leaves."""
    constant = ppo_config.reward[0].replace(":letters", ":constant")
    config = dataclasses.replace(
        ppo_config,
        run_dir=str(tmp_path / "run"),
        eval_reward=(constant,),
        eval_every=2,
        early_stop="eval/reward/constant",
        early_stop_patience=2,
    )
    run = ppo.run(config)
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["eval/reward/constant"] == 0.25
    jax.tree.map(
        np.testing.assert_array_equal,
        load_pretrained(run.model)[1],
        load_pretrained(Path(config.policy))[1],
    )

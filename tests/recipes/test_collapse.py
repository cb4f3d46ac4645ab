"""`collapse.py`: signs of a collapsed policy, and runs that only look like one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algo.types import Prompts, Rollout
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.recipes import ppo
from rlhf_jax.recipes.collapse import CollapseWatch
from rlhf_jax.rollout.experience import distinct_share

PPO = PPOConfig(
    run_dir="r", policy="p", data="d", reward_model="m", batch_size=4, max_new_tokens=8
)
GRPO = GRPOConfig(
    run_dir="r",
    policy="p",
    data="d",
    reward=("rules.py:exact",),
    batch_size=4,
    group_size=2,
    max_new_tokens=8,
)
HEALTHY = {
    "policy/entropy": 0.03,  # as in the arithmetic task, where it is solved to 85%
    "response/distinct": 0.5,
    "response/stop_rate": 1.0,  # as in the quickstart
    "response/length_mean": 2.0,
    "reward/score_mean": 0.5,
    "reward/score_std": 0.2,
    "reward/exact": 0.5,
    "group/no_signal": 0.75,
}
SIGNS = [
    ({"policy/entropy": 0.0005}, "the entropy is near zero"),
    ({"response/distinct": 0.25}, "all responses of a batch are alike"),
    ({"response/stop_rate": 0.0}, "no response has a stop token"),
    ({"response/length_mean": 1.0}, "every response ends at once"),
    ({"reward/score_std": 0.0}, "have the same score"),
    ({"group/no_signal": 1.0}, "have the same score"),
]


def said(config, rows):
    """The lines of a run with these rows of metrics, by update from 1."""
    watch = CollapseWatch(config)
    lines = enumerate((watch.see(row) for row in rows), start=1)
    return [(number, line) for number, found in lines for line in found]


@pytest.mark.parametrize(("sign", "text"), SIGNS)
@pytest.mark.parametrize("config", [PPO, GRPO], ids=["ppo", "grpo"])
def test_a_sign_is_named_once_after_ten_updates(config, sign, text):
    ((number, line),) = said(config, [HEALTHY] * 3 + [HEALTHY | sign] * 40)
    assert number == 13
    assert text in line and ": " in line and "\n" not in line


@pytest.mark.parametrize(("sign", "_"), SIGNS)
def test_a_sign_that_passes_is_not_named(sign, _):
    rows = ([HEALTHY | sign] * 9 + [HEALTHY]) * 4
    assert said(PPO, rows) == []


def test_several_signs_are_named_each():
    collapsed = HEALTHY | SIGNS[0][0] | SIGNS[1][0]
    lines = said(PPO, [collapsed] * 12)
    assert [number for number, _ in lines] == [10, 10]


def test_a_solved_task_is_no_collapse():
    certain = {"policy/entropy": 1e-4, "reward/score_std": 0.0, "group/no_signal": 1.0}
    solved = HEALTHY | certain | {"reward/exact": 1.0}
    assert said(GRPO, [solved] * 40) == []
    # At the same low score, it is one; and so it is without a score to pass.
    failed = HEALTHY | certain | {"reward/exact": 0.0}
    assert len(said(GRPO, [failed] * 40)) == 2
    assert len(said(dataclasses.replace(GRPO, eval_pass=None), [solved] * 40)) == 2
    # A reward that counts something goes beyond 1, the default of eval-pass.
    counted = HEALTHY | certain | {"reward/exact": 12.0}
    assert len(said(GRPO, [counted] * 40)) == 2


def test_one_response_is_not_compared():
    single = dataclasses.replace(PPO, batch_size=1)
    row = HEALTHY | {"response/distinct": 1.0, "reward/score_std": 0.0}
    assert said(single, [row] * 40) == []


def test_what_is_not_measured_is_no_sign():
    assert said(PPO, [{}] * 40) == []
    one_token = dataclasses.replace(PPO, max_new_tokens=1)
    short = HEALTHY | {"response/length_mean": 1.0}
    for rate in (0.0, 1.0):
        assert said(one_token, [short | {"response/stop_rate": rate}] * 40) == []


def test_a_run_prints_the_line(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_jax.recipes.collapse.PATIENCE", 2)
    monkeypatch.setattr("rlhf_jax.recipes.collapse.LOW_ENTROPY", 100.0)
    ppo.run(dataclasses.replace(stages.ppo, run_dir=str(tmp_path / "run")))
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if "entropy" in line]
    assert len(found) == 1
    assert found[0].startswith("warning: step 2: for 2 updates, the entropy is near")


@pytest.mark.parametrize(
    ("responses", "lengths", "share"),
    [
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]], [3, 3, 3, 3], 0.25),
        ([[1, 2, 3], [1, 2, 9], [1, 2, 7], [1, 2, 5]], [2, 2, 2, 2], 0.25),  # padding
        ([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [0, 1, 2, 3], 1.0),
        ([[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 2, 3]], [3, 3, 3, 3], 0.75),  # order
    ],
)
def test_the_share_of_distinct_responses(responses, lengths, share):
    one = jnp.ones((4, 1), jnp.int32)
    rollout = Rollout(
        prompts=Prompts(tokens=one, lengths=one[:, 0]),
        responses=jnp.asarray(responses, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        truncated=jnp.zeros(4, bool),
        logprobs=jnp.zeros((4, 3)),
    )
    assert distinct_share(rollout) == share


def test_distinct_responses_of_a_large_batch_are_counted():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50_000, (256, 6))
    rows[128:] = rows[:128]
    size = jnp.ones((256, 1), jnp.int32)
    rollout = Rollout(
        prompts=Prompts(tokens=size, lengths=size[:, 0]),
        responses=jnp.asarray(rows, jnp.int32),
        lengths=jnp.full(256, 6),
        truncated=jnp.zeros(256, bool),
        logprobs=jnp.zeros((256, 6)),
    )
    assert distinct_share(rollout) == 0.5

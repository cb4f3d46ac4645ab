"""A reward function that fails costs an evaluation or a step, and not the run."""

import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import grpo
from rlhf_jax.rewards.functions import RewardFunctionError
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.session import Session

REWARDS = """
import pathlib

BROKEN = pathlib.Path(__file__).with_name("broken")


def vowels(prompts, responses, columns):
    return [float(sum(map(text.count, "aeiou"))) for text in responses]


def fragile(prompts, responses, columns):
    assert not BROKEN.exists(), "out of order"
    return vowels(prompts, responses, columns)
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS, "utf-8")
    return path


def undisturbed(rows):
    """Metrics by step, without the clock; lines of one step are put together."""
    found = {}
    for row in rows:
        found.setdefault(row["step"], {}).update(row)
    return {
        step: {name: x for name, x in row.items() if not name.startswith("time/")}
        for step, row in found.items()
    }


@pytest.mark.parametrize(
    ("where", "after_step", "saved"),
    [
        ("reward", 1, 1),  # asked in step 2: what step 1 made is saved
        ("eval_reward", 2, 3),  # asked after step 3, the last: that is saved
    ],
)
def test_the_run_goes_on_when_the_function_is_repaired(
    grpo_config, rewards, tmp_path, monkeypatch, where, after_step, saved
):
    functions = {"reward": (f"{rewards}:vowels",), "eval_reward": ()}
    functions[where] = (f"{rewards}:fragile",)
    config = dataclasses.replace(
        grpo_config,
        **functions,
        run_dir=str(tmp_path / "run"),
        updates=3,
        eval_every=3,
        early_stop="eval/score_mean",
    )
    broken = tmp_path / "broken"
    log = Session.log

    def log_then_break(self, step, metrics, *, shown):
        log(self, step, metrics, shown=shown)
        if step == after_step:
            broken.touch()

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", log_then_break)
        with pytest.raises(RewardFunctionError, match="fragile, row 0") as stopped:
            grpo.run(config)
    assert f"saved after step {saved}" in str(stopped.value)
    assert "--resume" in str(stopped.value) and "\n" not in str(stopped.value)

    broken.unlink()
    # More time or memory for the function may be what repairs it.
    limits = {"reward_time_limit": 9.0, "reward_memory_limit": 100.0}
    resumed = grpo.run(dataclasses.replace(config, resume=True, **limits))
    whole = grpo.run(dataclasses.replace(config, run_dir=str(tmp_path / "whole")))
    assert undisturbed(read_metrics(resumed.metrics)) == undisturbed(
        read_metrics(whole.metrics)
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        load_pretrained(resumed.model)[1],
        load_pretrained(whole.model)[1],
    )

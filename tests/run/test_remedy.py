"""A run that went astray: what is kept, and that the command it prints works."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import cli
from rlhf_jax.config.run import OptimizerConfig
from rlhf_jax.learner.finite import NonFiniteError
from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.recipes import ppo as ppo_programs
from rlhf_jax.run.checkpointer import Checkpointer
from rlhf_jax.run.log_files import read_metrics, read_samples
from rlhf_jax.run.remedy import remedy
from rlhf_jax.run.run_directory import RunDirectory


def printed_command(error):
    """The command at the end of the line, as a shell splits it, without its name."""
    message = str(error)
    assert "\n" not in message
    words = shlex.split(message[message.index(": rlhf-jax ") + 2 :])
    assert words[0] == "rlhf-jax"
    return words[1:]


def saved_steps(run_dir):
    with Checkpointer(Path(run_dir) / "checkpoints") as checkpointer:
        return checkpointer.steps()


def logged_steps(run_dir):
    return [row["step"] for row in read_metrics(Path(run_dir) / "metrics.jsonl")]


# ---- what is said ----


def said(step, optimizer_step, saved, **options):
    error = NonFiniteError("policy_loss is NaN", optimizer_step=optimizer_step)
    options = {
        "stage": "sft",
        "run_dir": Path("my runs/a"),
        "rates": {"optimizer.learning-rate": 5e-4},
    } | options
    return remedy(error, step=step, saved=saved, **options)


@pytest.mark.parametrize(
    ("step", "optimizer_step", "saved", "resumed", "earlier"),
    [
        (45, 0, [20, 40], 40, "there are: 20"),
        (41, 0, [20, 40], 20, "restart in a new --run-dir"),  # 40 would fail again
        (41, 3, [20, 40], 40, "there are: 20"),  # 40 takes three other steps first
        (41, 0, [20, 30, 40], 30, "there are: 20"),
    ],
)
def test_the_newest_checkpoint_that_can_help_is_named(
    step, optimizer_step, saved, resumed, earlier
):
    line = said(step, optimizer_step, saved)
    assert line.startswith("policy_loss is NaN. ")
    assert earlier in line
    assert printed_command(line) == [
        *("sft", "--config", "my runs/a/config.yaml"),
        *("--resume", "--resume-step", str(resumed)),
        *("--optimizer.learning-rate", "5e-05"),
    ]


@pytest.mark.parametrize(
    ("step", "optimizer_step", "saved", "why"),
    [
        (41, 0, [40], "that of step 40 would fail again"),
        (3, 0, [], "none was saved"),
        (1, 2, [], "none was saved"),
    ],
)
def test_where_no_checkpoint_can_help_the_run_starts_again(
    step, optimizer_step, saved, why
):
    rates = {"actor-optimizer.learning-rate": 1.0, "critic-optimizer.learning-rate": 0}
    line = said(step, optimizer_step, saved, stage="ppo", rates=rates)
    assert why in line
    assert printed_command(line) == [
        *("ppo", "--config", "my runs/a/config.yaml"),
        *("--run-dir", "my runs/a-lower-rate"),
        *("--actor-optimizer.learning-rate", "0.01"),  # never more than that
        *("--critic-optimizer.learning-rate", "0"),
    ]


def test_no_learning_rate_mends_the_first_optimizer_step_of_a_run():
    line = said(1, 0, [])
    assert "check the data" in line
    assert "learning-rate" not in line and "--resume" not in line


# ---- that it works ----


LIMIT = 1.3
ASTRAY = OptimizerConfig(
    learning_rate=0.05, schedule="constant", warmup_fraction=0.0, max_grad_norm=0.0
)
"""The largest weights are the scales of norms, which start at 1. At this rate some pass
1.3 within a few steps; at a tenth of it 24 steps cannot."""


def astray(make):
    """An objective that is NaN where a weight, of the actor or the model, is large."""

    def make_astray(*args, **options):
        objective = make(*args, **options)

        def of_weights(params, batch, divisor):
            loss, metrics = objective(params, batch, divisor)
            leaves = jax.tree.leaves(getattr(params, "actor", params))
            largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
            return loss + jnp.where(largest > LIMIT, jnp.nan, 0.0), metrics

        return of_weights

    return make_astray


def failure(error):
    """The step that failed, and the first of its optimizer steps that did."""
    found = re.match(
        r"step (\d+): \w+ is not finite \(optimizer step (\d+) ", str(error)
    )
    assert found is not None
    assert int(found[2]) == error.optimizer_step
    return int(found[1]), int(found[2])


def test_sft_goes_on_by_the_command_that_it_prints(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "imitation_objective", astray(sft.imitation_objective))
    config = dataclasses.replace(
        stages.sft,
        run_dir=str(tmp_path / "run"),
        optimizer=ASTRAY,
        steps=16,
        eval_every=8,
        checkpoint_every=2,
    )
    with pytest.raises(NonFiniteError, match="lower learning rate") as stopped:
        sft.run(config)
    failed, _ = failure(stopped.value)
    # What was due is there, and the state before the step that failed.
    due = list(range(2, failed, 2))[-2:]
    assert saved_steps(config.run_dir) == sorted({*due, failed - 1})
    assert logged_steps(config.run_dir) == list(range(failed))
    # The state right before it fails again, for it is the weights that make the NaN.
    named = max(step for step in due if step < failed - 1)
    command = printed_command(stopped.value)
    assert command[command.index("--resume-step") + 1] == str(named)

    cli.main([*command, "--quiet"])
    assert saved_steps(config.run_dir) == [14, 16]
    assert logged_steps(config.run_dir) == list(range(17))
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    rates = [row["optim/learning_rate"] for row in rows[1:]]
    want = [0.05] * named + [0.005] * (16 - named)
    np.testing.assert_allclose(rates, want, rtol=1e-5)
    stored = RunDirectory(Path(config.run_dir)).read_config()
    assert stored["optimizer"]["learning_rate"] == 0.005
    assert "resume_step" not in stored
    params = load_pretrained(Path(config.run_dir) / "model")[1]
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(params)) < LIMIT


RUINOUS = dataclasses.replace(ASTRAY, learning_rate=1e38)
"""Overflows at the second step; the weights after the first one are of no use."""


def test_a_rate_that_ruins_everything_at_once(stages, tmp_path):
    config = dataclasses.replace(
        stages.sft, run_dir=str(tmp_path / "run"), optimizer=RUINOUS
    )
    with pytest.raises(NonFiniteError, match=r"^step 2: .*would fail again") as stopped:
        sft.run(config)
    assert saved_steps(config.run_dir) == [1]
    cli.main([*printed_command(stopped.value), "--quiet"])
    assert logged_steps(f"{config.run_dir}-lower-rate") == [0, 1, 2, 3, 4]


def test_a_rate_that_ruins_a_good_run_late(stages, tmp_path):
    config = dataclasses.replace(
        stages.sft, run_dir=str(tmp_path / "run"), steps=12, checkpoint_every=2
    )
    sft.run(config)
    ruined = dataclasses.replace(config.optimizer, learning_rate=1e38)
    ruined = dataclasses.replace(
        config, resume=True, resume_step=10, optimizer=ruined, checkpoint_every=50
    )
    with pytest.raises(NonFiniteError, match=r"^step 12: ") as stopped:
        sft.run(ruined)
    # The state after step 11 is ruined; that of step 10, which is good, is still there.
    assert saved_steps(config.run_dir) == [10, 11]
    command = printed_command(stopped.value)
    assert command[command.index("--resume-step") + 1] == "10"
    cli.main([*command, "--quiet"])
    assert saved_steps(config.run_dir)[-1] == 12
    assert logged_steps(config.run_dir) == list(range(13))


def run_astray(stages, tmp_path, monkeypatch, **options):
    """A PPO run whose weights grow too large: its configuration, and its error."""
    monkeypatch.setattr(
        ppo_programs, "ppo_objective", astray(ppo_programs.ppo_objective)
    )
    config = dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path / "run"),
        actor_optimizer=ASTRAY,
        updates=6,
        eval_every=2,
        **options,
    )
    with pytest.raises(NonFiniteError, match="lower learning rate") as stopped:
        ppo.run(config)
    return config, stopped.value


def test_ppo_goes_on_by_the_command_that_it_prints(stages, tmp_path, monkeypatch):
    config, error = run_astray(stages, tmp_path, monkeypatch, checkpoint_every=1)
    failed, optimizer_step = failure(error)
    kept = list(range(1, failed))[-2:]
    assert saved_steps(config.run_dir) == kept
    named = max(step for step in kept if step < failed - 1 or optimizer_step > 0)
    command = printed_command(error)
    assert command[command.index("--resume-step") + 1] == str(named)

    cli.main([*command, "--quiet"])
    assert saved_steps(config.run_dir) == [5, 6]
    assert logged_steps(config.run_dir) == list(range(7))
    samples = read_samples(Path(config.run_dir) / "samples.jsonl")
    assert [row["step"] for row in samples] == sorted([0, 2, 4, 6] * 8)
    stored = RunDirectory(Path(config.run_dir)).read_config()
    assert stored["actor_optimizer"]["learning_rate"] == 0.005
    assert stored["critic_optimizer"]["learning_rate"] == pytest.approx(
        config.critic_optimizer.learning_rate / 10
    )


def test_a_late_optimizer_step_is_undone_with_its_update(stages, tmp_path, monkeypatch):
    config, error = run_astray(stages, tmp_path, monkeypatch, checkpoint_every=50)
    failed, optimizer_step = failure(error)
    assert failed > 1 and optimizer_step > 0
    assert saved_steps(config.run_dir) == [failed - 1]  # none was due
    command = printed_command(error)
    assert command[command.index("--resume-step") + 1] == str(failed - 1)
    cli.main([*command, "--quiet"])
    assert logged_steps(config.run_dir) == list(range(7))


def test_without_undo_nothing_is_saved(stages, tmp_path, monkeypatch):
    config, error = run_astray(
        stages, tmp_path, monkeypatch, checkpoint_every=50, undo_updates=False
    )
    assert "none was saved" in str(error) and "replay" not in str(error)
    assert saved_steps(config.run_dir) == []


# ---- an earlier checkpoint ----


def test_an_earlier_checkpoint_leads_to_the_same_end(stages, tmp_path):
    config = dataclasses.replace(
        stages.sft, run_dir=str(tmp_path / "run"), steps=4, checkpoint_every=1
    )
    sft.run(config)
    first = load_pretrained(Path(config.run_dir) / "model")[1]
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    assert saved_steps(config.run_dir) == [3, 4]
    sft.run(dataclasses.replace(config, resume=True, resume_step=3))
    assert saved_steps(config.run_dir) == [3, 4]
    again = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    drop = ("time/step_seconds", "time/tokens_per_second")
    for row in (*rows, *again):
        for name in drop:
            row.pop(name, None)
    assert again == rows
    last = load_pretrained(Path(config.run_dir) / "model")[1]
    jax.tree.map(np.testing.assert_array_equal, first, last)


def test_a_checkpoint_that_is_not_there_is_refused(stages, refused):
    run_dir, config = stages.sft.run_dir, f"{stages.sft.run_dir}/config.yaml"
    line = refused("sft", "--config", config, "--resume", "--resume-step", 2)
    assert "resume-step=2: has no checkpoint in" in line
    assert line.endswith("there are: 3, 4")
    line = refused("sft", "--config", config, "--resume-step", 3)
    assert line.endswith("resume-step=3: requires --resume")
    assert saved_steps(run_dir) == [3, 4]


# ---- going back, disturbed ----


@pytest.fixture
def finished(stages, tmp_path):
    """A finished run of four steps, with checkpoints of the last two."""
    config = dataclasses.replace(
        stages.sft, run_dir=str(tmp_path / "run"), checkpoint_every=1
    )
    sft.run(config)
    assert saved_steps(config.run_dir) == [3, 4]
    return config


def test_what_fails_before_the_logs_are_cut_leaves_them_whole(finished, monkeypatch):
    def killed(self, step):
        raise KeyboardInterrupt

    back = dataclasses.replace(finished, resume=True, resume_step=3)
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_jax.run.checkpointer.Checkpointer.remove_after", killed)
        with pytest.raises(KeyboardInterrupt):
            sft.run(back)
    assert logged_steps(finished.run_dir) == [0, 1, 2, 3, 4]
    sft.run(back)
    assert logged_steps(finished.run_dir) == [0, 1, 2, 3, 4]
    assert saved_steps(finished.run_dir) == [3, 4]


@pytest.mark.parametrize("missing", ["meta", "."])
def test_a_damaged_checkpoint_is_one_line_that_names_the_others(finished, missing):
    where = Path(finished.run_dir) / "checkpoints" / "4"
    shutil.rmtree(where / missing)
    where.mkdir(exist_ok=True)
    with pytest.raises(
        ValueError, match=r"resume-step=4: is damaged in .*; others: 3"
    ) as found:
        sft.run(dataclasses.replace(finished, resume=True, resume_step=4))
    assert "\n" not in str(found.value)
    assert logged_steps(finished.run_dir) == [0, 1, 2, 3, 4]
    shutil.rmtree(where)
    sft.run(dataclasses.replace(finished, resume=True, resume_step=3))


@pytest.mark.parametrize("rate", ["inf", "nan", "-1"])
def test_a_learning_rate_is_a_number(refused, tmp_path, rate):
    flags = ("--data", "d", "--run-dir", str(tmp_path / "r"), "--fresh.family", "gpt2")
    line = refused("sft", *flags, "--optimizer.learning-rate", rate)
    assert "optimizer.learning-rate=" in line and "must be finite" in line

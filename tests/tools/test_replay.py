"""`rlhf-jax replay`: one step again, from its batch and the state before it."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import cli
from rlhf_jax.learner.finite import NonFiniteError
from rlhf_jax.recipes import grpo, ppo, reward_model, sft
from rlhf_jax.run.nonfinite import read_dump, write_dump
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.tools.replay import replay

STAGES = {
    "sft": (sft, "imitation_objective"),
    "reward": (reward_model, "preference_objective"),
    "ppo": (ppo, "ppo_objective"),
    "grpo": (grpo, "critic_free_objective"),
}


def failing(make):
    """An objective whose loss is NaN."""

    def make_failing(*args, **options):
        objective = make(*args, **options)

        def of(params, batch, divisor):
            loss, metrics = objective(params, batch, divisor)
            return loss + jnp.nan, metrics

        return of

    return make_failing


def run_failing(module, objective, config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, objective, failing(getattr(module, objective)))
        with pytest.raises(NonFiniteError) as stopped:
            module.run(config)
    return str(stopped.value)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_replayed_without_its_data(
    stages, grpo_config, tmp_path, monkeypatch, capsys, stage
):
    module, objective = STAGES[stage]
    config = grpo_config if stage == "grpo" else vars(stages)[stage]
    data = shutil.copy(config.data, tmp_path / "data.jsonl")
    run_dir = str(tmp_path / "run")
    config = dataclasses.replace(config, run_dir=run_dir, data=data)
    error = run_failing(module, objective, config, monkeypatch)
    Path(data).unlink()
    start = error.index("`rlhf-jax replay") + len("`rlhf-jax ")
    command = error[start : error.index("`", start)].split()
    assert command == ["replay", "--run-dir", run_dir, "--step", "1"]

    # Without what made the loss NaN, every term is finite.
    capsys.readouterr()
    cli.main(command)
    lines = capsys.readouterr().out.splitlines()
    assert "step 1:" in lines[0] and "not finite" in lines[0]
    assert "all terms are finite: the failure did not happen again" in lines
    assert lines[-1] == "each row alone is finite, in the batch and before the step"
    number = {"sft": 1, "reward": 1, "ppo": 4, "grpo": 1}[stage]
    assert [line.split()[0] for line in lines[3 : 3 + number]] == [
        str(step) for step in range(number)
    ]


def test_a_later_step_starts_from_its_checkpoint(stages, tmp_path, monkeypatch):
    # A rate of 1e38 ruins the weights in step 1; step 2 fails.
    config = dataclasses.replace(
        stages.sft,
        run_dir=str(tmp_path / "run"),
        optimizer=dataclasses.replace(
            stages.sft.optimizer,
            learning_rate=1e38,
            schedule="constant",
            warmup_fraction=0.0,
        ),
    )
    with pytest.raises(NonFiniteError, match=r"^step 2"):
        sft.run(config)
    directory = RunDirectory(tmp_path / "run")
    dump = read_dump(directory, 2)
    found = replay(directory, dump)
    assert found.first["loss"] == 0
    assert found.rows["loss before the step"].all()
    assert not found.rows["tokens"].any()
    assert 1e37 < found.largest_weight < 1e39
    shutil.rmtree(directory.checkpoints / "1")
    with pytest.raises(ValueError, match=r"checkpoint 1, is not in .*: none$"):
        replay(directory, dump)


def test_the_rows_that_are_not_finite_are_named(stages, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(stages.ppo, run_dir=str(tmp_path / "run"))
    run_failing(ppo, "ppo_objective", config, monkeypatch)
    directory = RunDirectory(tmp_path / "run")
    dump = read_dump(directory, 1)
    assert len(dump.prompts) == config.batch_size == 8
    advantages = np.array(dump.batch.advantages)
    advantages[5, 0] = np.nan
    padding = ~np.asarray(dump.batch.mask)
    returns = np.where(padding, np.nan, dump.batch.returns)  # may hold anything
    batch = dataclasses.replace(dump.batch, advantages=advantages, returns=returns)
    write_dump(directory, dataclasses.replace(dump, batch=batch))
    cli.main(["replay", "--run-dir", config.run_dir])
    out = capsys.readouterr().out
    assert "advantages: not finite in rows 5\n" in out
    assert f"row 5: {dump.prompts[5]!r}" in out
    assert "returns: not finite" not in out
    assert "policy_loss: not finite from optimizer step" in out


def test_nothing_to_replay_is_one_line(refused, tmp_path):
    line = refused("replay", "--run-dir", tmp_path)
    assert f"run-dir='{tmp_path}': nothing to replay" in line
    line = refused("replay", "--run-dir", tmp_path, "--step", 7)
    assert "step=7: there is no" in line and line.endswith("steps with one: none")

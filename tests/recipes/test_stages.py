"""The three stages, from text to a Hugging Face directory, and their runs resumed."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.run.interrupt import Interrupted
from rlhf_jax.run.log_files import read_metrics, read_samples
from rlhf_jax.run.session import Session


def trained_params(run_dir):
    return load_pretrained(Path(run_dir) / "model")[1]


def metrics_without_time(run_dir):
    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in rows
    ]


def test_a_stage_leaves_everything_behind(stages, ppo_run):
    for config in (stages.sft, stages.reward, stages.ppo):
        run_dir = Path(config.run_dir)
        stored = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert stored["seed"] == config.seed
        launch = json.loads((run_dir / "launches.jsonl").read_text().splitlines()[0])
        assert launch["versions"]["jax"] == jax.__version__
        assert (run_dir / "model" / "model.safetensors").stat().st_size > 0
        assert (run_dir / "model" / "tokenizer.json").exists()
        assert "<svg" in (run_dir / "report.html").read_text("utf-8")
        assert any((run_dir / "checkpoints").iterdir())


def test_every_step_is_logged_once(stages, ppo_run):
    rows = read_metrics(ppo_run.metrics)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for name in ("reward/score_mean", "kl/sequence", "policy/entropy", "value/loss"):
        assert all(np.isfinite(row[name]) for row in rows[1:])
    assert [row["step"] for row in rows if "eval/score_mean" in row] == [0, 2, 4]


def test_first_minibatch_is_on_policy(ppo_run):
    for row in read_metrics(ppo_run.metrics)[1:]:
        assert row["policy/first_clip_fraction"] == 0.0
        assert row["policy/first_approx_kl"] < 1e-9


def test_policy_starts_at_the_reference(ppo_run):
    first = read_metrics(ppo_run.metrics)[1]
    assert abs(first["kl/sequence"]) < 1e-4  # twelve tokens of float32 rounding


def test_samples_are_of_held_out_prompts_before_and_after(stages, ppo_run):
    samples = read_samples(ppo_run.samples)
    before = [row["prompt"] for row in samples if row["step"] == 0]
    after = [row["prompt"] for row in samples if row["step"] == 4]
    assert before == after
    assert len(before) == 8  # all that are held out
    assert all(np.isfinite(row["score"]) for row in samples)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_interrupted_ppo_goes_on_where_it_stopped(
    stages, ppo_run, tmp_path, monkeypatch, name
):
    config = dataclasses.replace(stages.ppo, run_dir=str(tmp_path / "run"))
    log = Session.log

    def log_then_interrupt(self, step, metrics, *, shown):
        log(self, step, metrics, shown=shown)
        if step == 2:  # no checkpoint is due: the signal alone must save
            os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", log_then_interrupt)
        with pytest.raises(Interrupted, match="--resume") as stopped:
            ppo.run(config)
    assert "after step 2 of 4" in str(stopped.value)

    ppo.run(dataclasses.replace(config, resume=True))
    assert metrics_without_time(tmp_path / "run") == metrics_without_time(ppo_run.path)
    jax.tree.map(
        np.testing.assert_array_equal,
        trained_params(tmp_path / "run"),
        trained_params(ppo_run.path),
    )
    assert read_samples(tmp_path / "run" / "samples.jsonl") == read_samples(
        ppo_run.samples
    )


def test_a_finished_run_goes_on_from_its_written_configuration(stages, ppo_run):
    stored = yaml.safe_load(ppo_run.config.read_text("utf-8"))
    assert "resume" not in stored and "quiet" not in stored
    before = trained_params(ppo_run.path)
    ppo.run(dataclasses.replace(stages.ppo, resume=True))
    jax.tree.map(np.testing.assert_array_equal, before, trained_params(ppo_run.path))


def test_interrupted_sft_goes_on_where_it_stopped(stages, tmp_path, monkeypatch):
    config = dataclasses.replace(stages.sft, run_dir=str(tmp_path / "run"))
    log = Session.log

    def log_then_interrupt(self, step, metrics, *, shown):
        log(self, step, metrics, shown=shown)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "log", log_then_interrupt)
        with pytest.raises(Interrupted):
            sft.run(config)
    sft.run(dataclasses.replace(config, resume=True))
    assert metrics_without_time(tmp_path / "run") == metrics_without_time(
        stages.sft.run_dir
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        trained_params(tmp_path / "run"),
        trained_params(stages.sft.run_dir),
    )


def test_adaptive_kl_coefficient_moves_and_is_logged(stages, tmp_path):
    config = dataclasses.replace(
        stages.ppo,
        run_dir=str(tmp_path / "run"),
        kl=dataclasses.replace(stages.ppo.kl, target=100.0, horizon=16),
        old_logprobs="recomputed",
    )
    rows = read_metrics(ppo.run(config).metrics)
    # KL is far below 100: the error is clipped to -0.2, and -0.2 · 8 / 16 = -0.1.
    coefficients = [row["kl/coef"] for row in rows[1:]]
    np.testing.assert_allclose(coefficients, [0.05, 0.045, 0.0405, 0.03645], rtol=1e-5)

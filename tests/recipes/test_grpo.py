"""GRPO from a Hugging Face directory to one: what it logs, learns, keeps, resumes."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import grpo
from rlhf_jax.rewards.functions import RewardWorkers
from rlhf_jax.run.interrupt import Interrupted
from rlhf_jax.run.log_files import read_metrics, read_samples
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import Session

PATIENCE, SAMPLES, EVAL_EVERY = 2, 8, 4


def params_of(directory):
    return load_pretrained(Path(directory))[1]


def metrics_without_time(run):
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(run.metrics)
    ]


def assert_same_params(one, other):
    jax.tree.map(np.testing.assert_array_equal, params_of(one), params_of(other))


@dataclasses.dataclass(frozen=True)
class Call:
    """What reward functions were asked, and said."""

    function: str
    prompts: list[str]
    responses: list[str]
    scores: np.ndarray

    @classmethod
    def recorded(cls, patch) -> list["Call"]:
        """A list to which every call is added while the patch lasts."""
        calls: list[Call] = []
        score = RewardWorkers.score

        def score_and_tell(self, prompts, responses, columns):
            found = score(self, prompts, responses, columns)
            name = self.specs[0].rpartition(":")[2]
            calls.append(cls(name, list(prompts), list(responses), found.scores))
            return found

        patch.setattr(RewardWorkers, "score", score_and_tell)
        return calls


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run that ended early, with all that its reward functions were asked."""

    config: GRPOConfig
    run: RunDirectory
    calls: list[Call]

    @property
    def rows(self):
        return read_metrics(self.run.metrics)

    @property
    def evaluations(self):
        return [row for row in self.rows if "eval/score_mean" in row]

    def rounds(self):
        """The training calls of every step, from 1 on."""
        # Checks of empty answers are shorter, evaluations longer.
        training = [
            call
            for call in self.calls
            if call.function == "letters" and len(call.responses) == 16
        ]
        for row in self.rows[1:]:
            count = 1 + int(row["group/resampled"]) // 8
            yield row, training[:count]
            training = training[count:]
        assert training == []


@pytest.fixture(scope="module")
def recorded(grpo_config, tmp_path_factory) -> Recorded:
    """Everything at once: resampling, a policy that answers for two updates, a stop."""
    taste = grpo_config.reward[0].replace(":letters", ":taste")
    config = dataclasses.replace(
        grpo_config,
        run_dir=str(tmp_path_factory.mktemp("recorded") / "run"),
        resample=2,
        refresh_every=2,
        eval_reward=(taste,),
        eval_every=EVAL_EVERY,
        eval_samples=SAMPLES,
        eval_pass=-1.0,
        early_stop="eval/reward/taste",
        early_stop_patience=PATIENCE,
        updates=60,
    )
    with pytest.MonkeyPatch.context() as patch:
        calls = Call.recorded(patch)
        run = grpo.run(config)
    return Recorded(config, run, calls)


def test_the_run_leaves_a_policy_and_its_tokenizer(recorded):
    module, params = load_pretrained(recorded.run.model)
    tokens = np.array([[5, 6, 7]])
    logits = module.apply({"params": params}, tokens, tokens > 0)
    assert np.isfinite(np.asarray(jax.tree.leaves(logits)[0])).all()
    assert (recorded.run.model / "tokenizer.json").exists()
    assert "<svg" in (recorded.run.path / "report.html").read_text("utf-8")


def test_every_metric_of_every_step(recorded):
    training = {
        *("reward/score_mean", "reward/score_std", "reward/letters"),
        *("group/score_std", "group/no_signal", "group/resampled"),
        *("group/kept_without_signal", "response/length_mean"),
        *("response/stop_rate", "response/distinct", "rollout/tokens"),
        *("kl/sequence", "kl/token"),
        *("kl/coef", "policy/loss", "policy/entropy"),
        *("policy/clip_fraction", "policy/approx_kl", "optim/actor_learning_rate"),
        "time/step_seconds",
    }
    held_out = {
        *("eval/score_mean", "eval/score_std", "eval/reward/letters"),
        *("eval/reward/taste", "eval/pass_at_1", "eval/pass_at_2"),
        *("eval/pass_at_4", "eval/pass_at_8", "eval/length_mean"),
        *("eval/stop_rate", "eval/kl_sequence"),
    }
    first, *rest = recorded.rows
    assert {name for name in first if not name.startswith("time/")} == {
        "step",
        *held_out,
    }
    for row in rest:
        assert training <= set(row)
        evaluated = row["step"] % EVAL_EVERY == 0
        assert {name for name in row if name.startswith("eval/")} == (
            held_out if evaluated else set()
        )
        assert all(np.isfinite(value) for value in row.values())
    assert [row["step"] for row in recorded.rows] == list(range(len(recorded.rows)))


def test_the_run_can_stop_by_every_held_out_metric(recorded):
    config = dataclasses.replace(recorded.config, early_stop="eval/nothing")
    with pytest.raises(ValueError) as refused:
        config.validate()
    named = str(refused.value).rpartition("run: ")[2].split(", ")
    assert set(named) | {"step"} == {
        name for name in recorded.rows[0] if not name.startswith("time/")
    }


def test_a_reward_that_is_only_measured(recorded):
    for row in recorded.rows[1:]:
        assert "reward/taste" not in row
        assert row["reward/score_mean"] == row["reward/letters"]
    for row in recorded.evaluations:
        assert row["eval/score_mean"] == row["eval/reward/letters"]


def test_samples_are_of_the_same_held_out_prompts(recorded):
    samples = read_samples(recorded.run.samples)
    number = len(recorded.evaluations)
    assert len(samples) == 8 * number
    prompts = [row["prompt"] for row in samples]
    assert prompts == prompts[:8] * number
    assert len(set(prompts)) == 8
    trained = {
        x for c in recorded.calls if c.function == "letters" for x in c.prompts[:16]
    }
    assert len(trained - set(prompts)) == 32
    for row in samples:
        assert set(row) == {
            *("step", "prompt", "response", "score", "letters", "taste", "kl")
        }
        letters = row["response"].count("e")
        assert row["score"] == row["letters"] == letters
        assert row["taste"] == -abs(letters - 3)


def test_training_figures_are_of_all_answers_that_were_sampled(recorded):
    resampled = []
    for row, rounds in recorded.rounds():
        scores = np.array([call.scores for call in rounds])  # [rounds, 16]
        for call in rounds:  # two answers to each of eight prompts
            assert call.prompts[0::2] == call.prompts[1::2]
            assert len(set(call.prompts)) == 8
        spread = scores.reshape(-1, 2).std(axis=1)
        np.testing.assert_allclose(row["reward/score_mean"], scores.mean(), rtol=1e-6)
        np.testing.assert_allclose(row["group/no_signal"], np.mean(spread == 0))
        # As many groups with a signal as there are, the earliest, fill the batch.
        kept = spread[spread > 0][:8]
        assert row["group/kept_without_signal"] == 8 - len(kept)
        np.testing.assert_allclose(row["group/score_std"], kept.sum() / 8, rtol=1e-5)
        # Sampling goes on while there is need, for up to two more rounds.
        found = np.cumsum((spread > 0).reshape(-1, 8).sum(axis=1))
        assert (found[:-1] < 8).all()
        assert found[-1] >= 8 or len(rounds) == 3
        resampled += [
            set(call.prompts) != set(rounds[0].prompts) for call in rounds[1:]
        ]
    assert len(resampled) > 2 and all(resampled)  # with prompts of their own


def test_tokens_are_counted_over_the_run(recorded):
    rows = recorded.rows[1:]
    counts = np.diff([0, *(row["rollout/tokens"] for row in rows)])
    for row, count in zip(rows, counts, strict=True):
        answers = 16 + 2 * row["group/resampled"]
        assert answers <= count <= 12 * answers
        if not row["group/resampled"]:
            np.testing.assert_allclose(count, 16 * row["response/length_mean"])


def test_pass_rates_are_those_of_every_choice_of_answers(recorded):
    evaluations = [
        call
        for call in recorded.calls
        if call.function == "taste" and len(call.responses) == 8 * SAMPLES
    ]
    for row, call in zip(recorded.evaluations, evaluations, strict=True):
        passed: dict[str, list[bool]] = {}
        for prompt, response in zip(call.prompts, call.responses, strict=True):
            passed.setdefault(prompt, []).append(2 <= response.count("e") <= 4)
        assert [len(answers) for answers in passed.values()] == [SAMPLES] * 8
        for k in (1, 2, 4, 8):
            each = [
                np.mean([any(some) for some in itertools.combinations(answers, k)])
                for answers in passed.values()
            ]
            np.testing.assert_allclose(row[f"eval/pass_at_{k}"], np.mean(each), 1e-5)


def test_the_policy_learns_what_is_paid_for(recorded):
    first, last = recorded.evaluations[0], recorded.evaluations[-1]
    assert first["eval/reward/letters"] < 1.5
    assert last["eval/reward/letters"] > first["eval/reward/letters"] + 1.5


def test_an_older_policy_answers_until_it_is_refreshed(recorded):
    first, second, third = recorded.rows[1:4]
    assert abs(first["kl/sequence"]) < 1e-4
    assert abs(second["kl/sequence"]) < 1e-4  # still the start's answers
    assert abs(third["kl/sequence"]) > 0.01
    assert second["policy/first_approx_kl"] > 1e-5  # off policy from the first step on
    assert third["policy/first_approx_kl"] < 1e-6


def test_the_run_ends_when_patience_does_and_its_best_policy_is_kept(
    recorded, tmp_path
):
    at = int(np.argmax([row["eval/reward/taste"] for row in recorded.evaluations]))
    best = recorded.evaluations[at]["step"]
    assert recorded.rows[-1]["step"] == best + EVAL_EVERY * PATIENCE
    assert 0 < best < recorded.config.updates - EVAL_EVERY * PATIENCE
    # The learning rate is constant: the run up to there is a run of its own.
    config = dataclasses.replace(
        recorded.config,
        run_dir=str(tmp_path / "run"),
        updates=best,
        early_stop=None,
        early_stop_patience=3,
    )
    shorter = grpo.run(config)
    assert_same_params(shorter.model, recorded.run.model)


def test_an_interrupted_run_goes_on_where_it_stopped(recorded, tmp_path, monkeypatch):
    """Once between two refreshes of the policy that answers, once with patience low."""
    stops = [1, len(recorded.rows) - 2]
    config = dataclasses.replace(recorded.config, run_dir=str(tmp_path / "run"))
    log = Session.log

    def log_then_interrupt(self, step, metrics, *, shown):
        log(self, step, metrics, shown=shown)
        if stops and step == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Session, "log", log_then_interrupt)
    with pytest.raises(Interrupted, match=r"grpo stopped after step 1 of 60.*--resume"):
        grpo.run(config)
    resumed = dataclasses.replace(config, resume=True)
    with pytest.raises(Interrupted):
        grpo.run(resumed)
    run = grpo.run(resumed)
    assert stops == []
    assert metrics_without_time(run) == metrics_without_time(recorded.run)
    assert read_samples(run.samples) == read_samples(recorded.run.samples)
    assert_same_params(run.model, recorded.run.model)
    # And once more, when there is nothing left to do.
    again = grpo.run(resumed)
    assert metrics_without_time(again) == metrics_without_time(recorded.run)


def test_two_devices_learn_what_one_does(recorded, tmp_path):
    """Groups are replaced in the first update, and stay spread over the devices."""
    config = dataclasses.replace(
        recorded.config,
        early_stop=None,
        early_stop_patience=3,
        updates=1,
        refresh_every=1,
        # Far above rounding, so that Adam's first step does not magnify it.
        optimizer=dataclasses.replace(recorded.config.optimizer, eps=1.0),
    )
    runs = []
    for devices in (1, 2):
        mesh = dataclasses.replace(config.mesh, data=devices)
        run_dir = str(tmp_path / str(devices))
        runs.append(grpo.run(dataclasses.replace(config, run_dir=run_dir, mesh=mesh)))
    one, two = (metrics_without_time(run)[1] for run in runs)
    assert one["group/resampled"] > 0
    assert set(one) == set(two)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    start = params_of(config.policy)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), params_of(runs[0].model), start
    )
    assert max(jax.tree.leaves(moved)) > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        params_of(runs[0].model),
        params_of(runs[1].model),
    )


def test_going_back_behind_the_best_policy_starts_from_that_of_the_checkpoint(
    grpo_config, tmp_path
):
    """What was learned after step 2 is none of this run any more, and worse comes."""
    config = dataclasses.replace(
        grpo_config,
        run_dir=str(tmp_path / "run"),
        updates=4,
        checkpoint_every=2,
        early_stop="eval/score_mean",
        early_stop_patience=9,
    )
    run = grpo.run(config)
    best = json.loads((run.path / "best.json").read_text())
    assert best["step"] > 2  # it learns at every step
    logged = {r["step"]: r.get("eval/score_mean") for r in read_metrics(run.metrics)}
    ruinous = dataclasses.replace(config.optimizer, learning_rate=1e3)
    back = dataclasses.replace(config, resume=True, resume_step=2, optimizer=ruinous)
    grpo.run(back)
    best = json.loads((run.path / "best.json").read_text())
    assert best == {"step": 2, "eval/score_mean": logged[2]}

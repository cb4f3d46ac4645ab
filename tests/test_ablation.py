"""The ablation changes what it says, runs each case once, and adds up its seeds."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.algo.options import ScoreOptions
from rlhf_jax.config.ppo import PPOConfig, PPOMethod
from rlhf_jax.config.ppo_presets import trl
from rlhf_jax.config.run import to_dict
from rlhf_jax.learner.finite import NonFiniteError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

CHANGES = {
    "default": {},
    "no-whitening": {"advantages.whiten": "none"},
    "lambda-1": {"advantages.lam": 1.0},
    "k3-in-reward": {"kl.estimator": "k3"},
    "kl-in-loss": {"kl.place": "loss", "kl.estimator": "k2"},
    "no-value-clip": {"value_loss.clip_eps": None},
    "score-after-last": {"scores.position": "after_last_token"},
    "critic-from-sft": {"critic": "an sft/model"},
    "no-eos-penalty": {"scores.missing_eos": "keep"},
    "one-epoch": {"epochs": 1},
    "no-ratio-clip": {"policy_loss.clip_eps": 1_000_000.0},
    "shared-trunk": {"critic_trunk": "shared"},
    "adaptive-kl": {"kl.target": 3.0, "kl.horizon": 500},
    "dual-clip": {"policy_loss.dual_clip": 3.0},
    "adam-tf1": {"actor_optimizer.form": "tf1", "critic_optimizer.form": "tf1"},
    "entropy-bonus": {"policy_loss.entropy_coef": 0.01},
    "reward-whitening": {"scores.whiten_rewards": True},
}


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture
def cases():
    """The module `benchmarks/ablation_cases.py`."""
    return importlib.import_module("ablation_cases")


@pytest.fixture
def report():
    """The module `benchmarks/ablation_report.py`."""
    return importlib.import_module("ablation_report")


@pytest.fixture
def runs():
    """The module `benchmarks/ablation_runs.py`."""
    return importlib.import_module("ablation_runs")


DEFAULT_CONFIG = PPOConfig(
    run_dir="run",
    policy="an sft/model",
    reward_model="reward",
    data="prompts.jsonl",
    scores=ScoreOptions(missing_eos="subtract"),  # as the quickstart's
)


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {prefix + name: value} if inner is None else inner
    return found


# ---- cases ----


def test_each_case_changes_what_it_says_and_nothing_else(cases):
    before = flat(to_dict(DEFAULT_CONFIG))
    found = {}
    for case in cases.select(["debated", "extras"]):
        after = flat(to_dict(case.configure(DEFAULT_CONFIG)))
        found[case.name] = {k: v for k, v in after.items() if v != before[k]}
    assert found == CHANGES
    assert [case.name for case in cases.DEBATED] == list(CHANGES)[1:11]


def test_a_preset_replaces_the_method_and_nothing_else(cases):
    _, case = cases.select(["trl"])
    config = case.configure(dataclasses.replace(DEFAULT_CONFIG, seed=5, updates=7))
    methods = {field.name for field in dataclasses.fields(PPOMethod)}
    assert {name: vars(config)[name] for name in methods} == vars(trl())
    others = vars(DEFAULT_CONFIG) | {"seed": 5, "updates": 7}
    for name in others.keys() - methods:
        assert vars(config)[name] == others[name]


def test_groups_and_names_are_selected_once_and_after_the_default(cases):
    chosen = cases.select(["one-epoch", "debated", "default", "dual-clip"])
    assert [case.name for case in chosen[:3]] == [
        "default",
        "one-epoch",
        "no-whitening",
    ]
    assert len(chosen) == 12 and chosen[-1].name == "dual-clip"
    with pytest.raises(ValueError, match="lamda-1: expected some of default, debated"):
        cases.select(["lamda-1"])


# ---- report ----


def make_runs(report, name, rewards):
    return [
        report.Run(case=name, seed=seed, figures=None, error="the loss is nan")
        if reward is None
        else report.Run(
            case=name,
            seed=seed,
            figures={
                "true_reward": reward,
                "proxy_reward": 1.25,
                "kl": 4.0 + seed,
                "length": 20.5,
                "stop_rate": 0.996,
                "wall_seconds": 41.7,
            },
        )
        for seed, reward in enumerate(rewards)
    ]


@pytest.fixture
def summaries(cases, report):
    rewards = {
        "default": [2.0, 2.2, 2.4],
        "no-whitening": [1.5, 2.4, 1.8],
        "lambda-1": [2.5, 2.6, 3.0],
        "one-epoch": [None, 2.1, 2.2],
        "no-ratio-clip": [None, None, None],
    }
    found = [run for name in rewards for run in make_runs(report, name, rewards[name])]
    return report.summarize(cases.select(list(rewards)), found[::-1])


def test_differences_are_paired_by_seed(summaries):
    by_name = {summary.case.name: summary for summary in summaries}
    # Differences 0.5, 0.4, 0.6: mean 0.5, deviation 0.1, error 0.1 / √3. Tables give
    # Student's t for 95 % and 2 degrees of freedom as 4.303, and 4.303 · 0.0577 < 0.5.
    found = by_name["lambda-1"]
    assert found.gain == pytest.approx(0.5)
    assert found.gain_error == pytest.approx(0.1 / 3**0.5)
    assert found.clear
    # Differences −0.5, 0.2, −0.6: mean −0.3, squares of the rest 0.04 + 0.25 + 0.09.
    found = by_name["no-whitening"]
    assert found.gain == pytest.approx(-0.3)
    assert found.gain_error == pytest.approx((0.38 / 2 / 3) ** 0.5)
    assert not found.clear
    # Seeds 1 and 2 only: −0.1 and −0.2.
    found = by_name["one-epoch"]
    assert (found.seeds, found.diverged) == ([1, 2], [0])
    assert found.gain == pytest.approx(-0.15)
    assert found.gain_error == pytest.approx(0.05)
    # t = 3 passes no test with one degree of freedom, for which the table has 12.71.
    assert not found.clear
    assert by_name["default"].gain is None


def test_critical_values_are_those_of_the_tables(report):
    found = [report.critical(seeds) for seeds in (2, 3, 5, 10)]
    assert found == pytest.approx([12.706, 4.303, 2.776, 2.262], abs=5e-4)


def test_the_default_comes_first_then_from_high_to_low(summaries):
    assert [summary.case.name for summary in summaries] == [
        "default",
        "lambda-1",
        "one-epoch",
        "no-whitening",
        "no-ratio-clip",
    ]
    default = summaries[0]
    assert default.figures["true_reward"].mean == pytest.approx(2.2)
    assert default.figures["true_reward"].std == pytest.approx(0.2)
    assert default.points == {"true_reward": [2.0, 2.2, 2.4], "kl": [4.0, 5.0, 6.0]}


MACHINE = {
    "device": "cpu: cpu",
    "processor": "a processor",
    "cores": 2,
    "python": "3.11",
    "versions": {"jax": "0.10.2"},
    "commit": "abc",
    "command": "python ablation.py",
}
SFT = {
    "true_reward": -0.031,
    "proxy_reward": 0.12,
    "kl": 0.0,
    "length": 21.0,
    "stop_rate": 1.0,
}


def test_table(report, summaries):
    text = report.markdown(summaries, SFT, title="Title", machine=MACHINE, num_seeds=3)
    title, table, note, about = text.split("\n\n")
    assert title == "# Title"
    assert table.splitlines()[2:] == [
        "| *SFT, before PPO* |  | −0.03 |  | 0.12 | 0.00 | 21.0 | 1.000 |  |",
        "| default |  | 2.20 ± 0.20 |  "
        "| 1.25 ± 0.00 | 5.00 ± 1.00 | 20.5 | 0.996 | 42 |",
        "| λ = 1, not 0.95 | `--advantages.lam 1` | 2.70 ± 0.26 | **+0.50 ± 0.06** "
        "| 1.25 ± 0.00 | 5.00 ± 1.00 | 20.5 | 0.996 | 42 |",
        "| 1 epoch, not 4 (diverged: 1 of 3) | `--epochs 1` | 2.15 ± 0.07 "
        "| −0.15 ± 0.05 | 1.25 ± 0.00 | 5.50 ± 0.71 | 20.5 | 0.996 | 42 |",
        "| advantages not whitened | `--advantages.whiten none` | 1.90 ± 0.46 "
        "| −0.30 ± 0.25 | 1.25 ± 0.00 | 5.00 ± 1.00 | 20.5 | 0.996 | 42 |",
        "| policy ratio not clipped (diverged: 3 of 3) | `--policy-loss.clip-eps 1e6` "
        "| – | – | – | – | – | – | – |",
    ]
    assert len({line.count("|") for line in table.splitlines()}) == 1
    # Three cases were compared, at 5 % each: 0.15.
    assert "more than 4.3 standard errors" in note and "of 3 cases 0.15" in note
    assert "`python ablation.py`" in about and "commit abc" in about


def test_a_difference_that_rounds_to_nothing_has_no_minus(cases, report):
    found = make_runs(report, "default", [2.0]) + make_runs(report, "lambda-1", [1.999])
    summaries = report.summarize(cases.select(["lambda-1"]), found)
    text = report.markdown(summaries, SFT, title="", machine=MACHINE, num_seeds=1)
    assert "| 2.00 | +0.00 | 1.25 |" in text


def test_one_seed_has_no_spread(cases, report):
    found = make_runs(report, "default", [2.0]) + make_runs(report, "lambda-1", [2.5])
    summaries = report.summarize(cases.select(["lambda-1"]), found)
    assert summaries[1].gain == pytest.approx(0.5)
    assert summaries[1].gain_error is None and not summaries[1].clear
    text = report.markdown(summaries, SFT, title="", machine=MACHINE, num_seeds=1)
    assert "| 2.50 | +0.50 | 1.25 | 4.00 |" in text
    assert "One seed gives no standard error." in text


def test_plot_has_a_row_per_case_and_survives_divergence(report, summaries, tmp_path):
    path = tmp_path / "plot.png"
    report.draw(summaries, path, title="Title")
    width, height = png_size(path)
    report.draw(summaries[:2], path, title="Title")
    assert png_size(path)[0] == width == 1536
    assert png_size(path)[1] == height - 3 * 48  # three rows of 0.3 inches less


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


# ---- runs ----


def make_job(cases, runs, tmp_path, name="default"):
    _, *others = cases.select([name])
    config = dataclasses.replace(DEFAULT_CONFIG, run_dir=str(tmp_path), seed=3)
    return runs.Job(
        case=others[0] if others else cases.DEFAULT,
        config=config,
        models=tmp_path,
        num_judged=8,
    )


def test_a_diverged_run_is_an_outcome(cases, runs, tmp_path, monkeypatch):
    def diverge(config):
        raise NonFiniteError("policy/loss is nan")

    monkeypatch.setattr(runs.ppo, "run", diverge)
    job = make_job(cases, runs, tmp_path)
    assert runs.read_result(job) is None
    outcome = runs.run_job(job)
    assert (outcome.case, outcome.seed, outcome.figures) == ("default", 3, None)
    assert outcome.error == "policy/loss is nan"
    assert runs.read_result(job) == outcome


SECONDS = {1: 30.0, 2: 2.0, 3: 2.5, 4: 9.0}  # by update


def test_a_result_of_other_options_is_refused(cases, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.ppo, "run", lambda _: None)
    monkeypatch.setattr(runs, "judge", lambda *_: {"true_reward": 1.5})
    rows = [{"step": step, "time/step_seconds": t} for step, t in SECONDS.items()]
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0}\n' + "".join(json.dumps(row) + "\n" for row in rows)
    )
    job = make_job(cases, runs, tmp_path)
    outcome = runs.run_job(job)
    # The median 2.5 of all but the first, which compiled, times 100 updates.
    assert outcome.figures == {"true_reward": 1.5, "wall_seconds": 250.0}
    assert runs.read_result(job) == outcome
    quiet = dataclasses.replace(job.config, quiet=True)
    assert runs.read_result(dataclasses.replace(job, config=quiet)) == outcome
    other = dataclasses.replace(job.config, epochs=2)
    with pytest.raises(ValueError, match="run with other options than default has now"):
        runs.read_result(dataclasses.replace(job, config=other))


# ---- the whole script ----


def run_script(*flags, environment=None):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "ablation.py", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        | (environment or {}),
    )


@pytest.mark.slow
def test_smoke_and_then_another_seed(tmp_path):
    work = tmp_path / "work"

    def smoke(seeds):
        done = run_script(
            *("--smoke", "--seeds", seeds, "--work-dir", work),
            environment={"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(done.stdout.splitlines()[-1])

    text, first = smoke(1)
    assert "2 runs of 2 updates, 0 of them done" in text
    text, second = smoke(2)
    assert "4 runs of 2 updates, 2 of them done" in text
    assert "SFT model" not in text.split("# PPO")[0]  # nothing is trained again

    assert second["machine"]["versions"]["jax"] and second["machine"]["command"]
    assert second["cases"][0]["case"]["name"] == "default"
    for before, after in zip(
        sorted(first["cases"], key=str), sorted(second["cases"], key=str), strict=True
    ):
        assert before["case"] == after["case"] and after["seeds"] == [0, 1]
        assert before["points"]["kl"] == after["points"]["kl"][:1]
    rows = [
        json.loads(line)
        for line in (work / "smoke" / "ablation.jsonl").read_text("utf-8").splitlines()
    ]
    assert [(row["case"], row["seed"], row["flags"]) for row in rows] == [
        ("default", 0, ""),
        ("no-whitening", 0, "--advantages.whiten none"),
        ("default", 1, ""),
        ("no-whitening", 1, "--advantages.whiten none"),
    ]
    for row in rows:
        assert row["settings"]["advantages"]["whiten"] == (
            "none" if row["flags"] else "batch"
        )
        assert row["machine"]["cores"] == os.cpu_count()
        assert row["error"] is None and 0 < row["figures"]["length"] <= 39
    assert second["sft"]["kl"] == 0.0  # of the SFT model to itself
    assert all(row["figures"]["kl"] != 0.0 for row in rows)
    # Different seeds, and different methods, end in different policies.
    assert len({row["figures"]["proxy_reward"] for row in rows}) > 1
    table = (work / "smoke" / "ablation.md").read_text("utf-8")
    assert re.search(
        r"advantages not whitened \| `--advantages.whiten none` \| −?\d", table
    )
    assert png_size(work / "smoke" / "ablation.png")[0] == 1536


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cases", "lambda"], "--cases lambda: expected some of default, debated"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--batch-size", "30"], "batch-size=30: must be a multiple of 4"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    done = run_script(*flags, "--work-dir", tmp_path / "work")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "work").exists()

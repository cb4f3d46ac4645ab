"""Whatever is wrong with rewards and groups is one line, before anything compiles."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from rlhf_jax import cli
from rlhf_jax.run.log_files import read_metrics, read_samples

REWARDS = Path(__file__).parents[1] / "letter_rewards.py"
EXACT = "rlhf_jax.tasks.verifiable:exact_answer"


def problems(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def sums(count):
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(count)]


@pytest.fixture
def grpo_on(stages, tmp_path):
    """The command line of a small run on given data."""

    def arguments(data, *flags):
        return [
            *("grpo", "--quiet", "--policy", stages.ppo.policy),
            *("--data", data, "--run-dir", tmp_path / "run"),
            *("--reward-processes", 1, "--eval-fraction", 0.25),
            *("--group-size", 2, "--batch-size", 4, "--max-new-tokens", 4),
            *flags,
        ]

    return arguments


@pytest.fixture
def letters_on(grpo_on, grpo_config):
    """The same with prompts for `letter_rewards`, and one of its functions."""

    def arguments(function, *flags):
        return grpo_on(grpo_config.data, "--reward", f"{REWARDS}:{function}", *flags)

    return arguments


# Reward functions that cannot be used.


def test_a_reward_file_that_is_not_there(refused, grpo_on, grpo_config, tmp_path):
    spec = f"{tmp_path}/mine.py:exact"
    message = refused(*grpo_on(grpo_config.data, "--reward", spec))
    assert spec in message and "no such file" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import surely_no_such_library", "surely_no_such_library"),
        ("x = 1\ndef exact(:\n", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_reward_file_that_cannot_be_imported(
    refused, grpo_on, grpo_config, tmp_path, text, named
):
    path = tmp_path / "mine.py"
    path.write_text(text)
    message = refused(*grpo_on(grpo_config.data, "--reward", f"{path}:exact"))
    assert f"{path}:exact" in message and "importing" in message and named in message


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("leters", "did you mean letters"),
        ("two_arguments", "(prompts, responses, columns)"),
        ("time", "not a function"),
    ],
)
def test_a_function_that_is_no_reward(refused, letters_on, function, named):
    message = refused(*letters_on(function))
    assert f"{REWARDS}:{function}" in message and named in message


@pytest.mark.parametrize("spec", ["letters", "mine.py", ":letters", "mine.py:"])
def test_a_spec_that_names_no_function(refused, grpo_on, grpo_config, spec):
    message = refused(*grpo_on(grpo_config.data, "--reward", spec))
    assert spec in message and "file.py:function" in message


def test_a_function_for_held_out_answers_is_checked_as_well(
    refused, letters_on, monkeypatch
):
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    message = refused(*letters_on("letters", "--eval-reward", "no_such_module:f"))
    assert "no_such_module:f" in message
    # Neither process outlives the command: not that of the first function either.
    assert [process.poll() is not None for process in started] == [True, True]


# Columns.


def test_a_row_without_an_answer(refused, grpo_on, tmp_path):
    rows = sums(8)
    del rows[5]["answer"]
    path = problems(tmp_path / "sums.jsonl", *rows)
    message = refused(*grpo_on(path, "--reward", EXACT))
    assert f"{path}:6" in message and '"answer"' in message


def test_an_answer_that_is_null(refused, grpo_on, tmp_path):
    rows = sums(8)
    rows[2]["answer"] = None
    path = problems(tmp_path / "sums.jsonl", *rows)
    message = refused(*grpo_on(path, "--reward", EXACT))
    assert f"{path}:3" in message and '"answer"' in message and "null" in message


def test_data_without_the_column_that_a_function_needs(refused, grpo_on, grpo_config):
    message = refused(*grpo_on(grpo_config.data, "--reward", EXACT))
    assert EXACT in message and '"answer"' in message
    assert "copy" in message  # what the function got


def test_columns_left_out_by_name(refused, grpo_on, tmp_path):
    path = problems(tmp_path / "sums.jsonl", *[row | {"level": 1} for row in sums(8)])
    flags = ("--reward", EXACT, "--reward-columns")
    message = refused(*grpo_on(path, *flags, "level"))
    assert EXACT in message and '"answer"' in message and "level" in message
    message = refused(*grpo_on(path, *flags, "solution"))
    assert f"{path}:1" in message and '"solution"' in message


# Options that contradict each other, or do nothing.


def test_no_reward_at_all(refused, grpo_on, grpo_config):
    message = refused(*grpo_on(grpo_config.data))
    assert "reward-model" in message and "file.py:function" in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--group-size 1", ["group-size=1", "at least 2"]),
        ("--group-size 0", ["group-size=0"]),
        ("--group-size 3 --batch-size 8", ["batch-size=8", "group-size=3"]),
        ("--minibatches 3", ["batch-size=4", "minibatches 3"]),
        ("--resample -1", ["resample=-1"]),
        ("--preset rloo --group-size 1", ["group-size=1", "leave-one-out"]),
        ("--preset remax --resample 1", ["resample=1", "greedy"]),
        ("--refresh-every 0", ["refresh-every=0"]),
        ("--reward-weights 1 2", ["reward-weights=(1.0, 2.0)", "each of the 1"]),
        ("--reward-weights nan", ["reward-weights=nan: must be finite"]),
        ("--reward-on-failure nan", ["reward-on-failure=nan"]),
        ("--reward-time-limit 0", ["reward-time-limit=0"]),
        ("--reward-time-limit inf", ["reward-time-limit=inf"]),
        (
            "--reward-time-limit 1e10",
            ["reward-time-limit=1", "at most 604800 (a week)"],
        ),
        ("--reward-memory-limit 0", ["reward-memory-limit=0.0", "above 0"]),
        ("--reward-memory-limit nan", ["reward-memory-limit=nan", "finite"]),
        (
            "--reward-memory-limit 1e30",
            ["reward-memory-limit=1e+30", "at most 1e+06"],
        ),
        (
            "--reward-weights 1e30",
            ["reward-weights=(1e+30,)", "from -1e+12 to 1e+12"],
        ),
        (
            "--reward-on-failure 1e30",
            ["reward-on-failure=1e+30", "from -1e+12 to 1e"],
        ),
        ("--reward-processes 0", ["reward-processes=0"]),
        ("--eval-samples 0", ["eval-samples=0"]),
        ("--early-stop-patience 2", ["early-stop-patience=2", "early-stop"]),
        ("--reward-model-weight 2", ["reward-model-weight=2", "reward-model"]),
        ("--ensemble x", ["ensemble=('x',)", "reward-model"]),
        ("--ensemble-score mean", ["ensemble-score='mean'", "ensemble"]),
        ("--ensemble-penalty 2", ["ensemble-penalty=2", "mean-minus-std"]),
        ("--preset dapo --reference x", ["reference='x'", "kl.place=none"]),
        ("--early-stop eval/scores", ["early-stop='eval/scores'", "eval/score_mean"]),
        ("--early-stop eval/pass_at_2", ["eval/pass_at_2", "eval/pass_at_1"]),
        ("--preset dapo --early-stop eval/kl_sequence", ["eval/kl_sequence"]),
        ("--early-stop eval/pass_at_1 --eval-pass None", ["eval/reward/letters"]),
    ],
)
def test_options_that_cannot_work(refused, letters_on, tmp_path, flags, named):
    message = refused(*letters_on("letters", *flags.split()))
    assert all(part in message for part in named), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--reward-weights 2", "reward-weights=(2.0,)"),
        ("--reward-on-failure 0", "reward-on-failure=0.0"),
        ("--reward-columns answer", "reward-columns=('answer',)"),
        ("--reward-processes 3", "reward-processes=3"),
        ("--reward-time-limit 3", "reward-time-limit=3.0"),
        ("--reward-memory-limit 3", "reward-memory-limit=3.0"),
        ("--reward-model-weight -1e300", "reward-model-weight=-1e+300"),
        ("--eval-pass 0.5", "eval-pass=0.5"),
    ],
)
def test_options_of_functions_where_there_are_none(refused, stages, flags, named):
    message = refused(
        *("grpo", "--policy", "p", "--reward-model", "r", "--data", "d"),
        *("--run-dir", "unused", *flags.split()),
    )
    assert named in message


def test_two_functions_of_one_name(refused, letters_on):
    message = refused(*letters_on("letters", "--eval-reward", "other.py:letters"))
    assert "reward=['letters']" in message and "name" in message


@pytest.mark.parametrize("name", ["score_mean", "model", "score", "step", "response"])
def test_a_name_that_a_metric_or_a_column_has(refused, letters_on, name):
    message = refused(*letters_on("letters", "--eval-reward", f"mine.py:{name}"))
    assert f"reward=['{name}']" in message and "rename" in message


def test_an_unknown_preset(refused, letters_on):
    message = refused(*letters_on("letters", "--preset", "dr_gpro"))
    assert "'dr_gpro'" in message and "dr_grpo" in message
    message = refused(*letters_on("letters", "--preset", "openai_2019"))
    assert "openai_2019" in message and "dapo" in message


def test_fewer_problems_than_groups(refused, grpo_on, tmp_path):
    path = problems(tmp_path / "sums.jsonl", *sums(4))
    message = refused(*grpo_on(path, "--reward", EXACT, "--batch-size", 8))
    assert "batch-size=8" in message and "group-size=2" in message
    assert "4 prompts" in message and "there are 3" in message


# Functions that fail once the run is on its way.


def test_a_function_that_raises(complaint, letters_on):
    message = complaint(*letters_on("refuses"))
    assert f"{REWARDS}:refuses, row 0 (response " in message
    assert "RuntimeError: no answer is good enough" in message


def test_a_function_that_hangs(complaint, letters_on):
    began = time.perf_counter()
    message = complaint(*letters_on("hang", "--reward-time-limit", 0.3))
    assert f"{REWARDS}:hang, row 0" in message and "0.3 s" in message
    assert time.perf_counter() - began < 120  # it would sleep for 600


def test_a_function_that_needs_more_memory(refused, letters_on):
    message = refused(*letters_on("letters", "--reward-memory-limit", 0.001))
    assert message.endswith("; --reward-memory-limit is 0.001 GiB: try more")


def test_failures_may_have_a_score(letters_on, tmp_path):
    flags = ["--reward-on-failure", -1.5, "--updates", 1, "--reward-weights", 2]
    cli.main([str(x) for x in letters_on("refuses", *flags)])
    _, row = read_metrics(tmp_path / "run" / "metrics.jsonl")
    samples = read_samples(tmp_path / "run" / "samples.jsonl")
    # An answer without text does not fail; it is worth 0.
    failed = [row["refuses"] for row in samples if row["response"]]
    assert failed and set(failed) == {-1.5}
    assert row["reward/failures"] == 4
    assert row["reward/score_mean"] == -3.0

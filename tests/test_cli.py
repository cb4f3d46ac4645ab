"""Help, configuration files, and the commands that read a finished model."""

import dataclasses
import json
from pathlib import Path

import pytest
import tyro
import yaml

from rlhf_jax import cli
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import to_dict
from rlhf_jax.config.supervised import SFTConfig


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    config_type = cli.COMMANDS[command].config

    def check(config_type, prefix=""):
        for field in dataclasses.fields(config_type):
            flag = f"--{prefix}{field.name.replace('_', '-')}"
            if dataclasses.is_dataclass(field.type):
                check(field.type, f"{prefix}{field.name.replace('_', '-')}.")
            else:
                assert flag in text or flag.replace("--", "--no-", 1) in text

    check(config_type)


def test_usage_lists_every_command(capsys):
    cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in cli.COMMANDS)


def test_flags_go_before_the_file(tmp_path):
    path = tmp_path / "ppo.yaml"
    path.write_text(
        "policy: a\nreward_model: b\ndata: c\nrun_dir: d\nupdates: 7\n"
        "kl:\n  coef: 0.25\n  target: 6.0\nstop: ['.']\n"
    )
    flags = ["--config", str(path), "--updates", "9", "--kl.target", "3"]
    config = cli.parse(PPOConfig, flags, prog="rlhf-jax ppo")
    assert config.updates == 9
    assert config.kl.coef == 0.25 and config.kl.target == 3.0
    assert config.kl.horizon == 10_000
    assert config.stop == (".",)


def test_values_in_a_file_are_checked_like_flags(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    # YAML 1.1 reads 1e-4, which lacks a point, as text.
    path.write_text("data: a\nrun_dir: b\noptimizer:\n  learning_rate: 1e-4\n")
    config = cli.parse(SFTConfig, [f"--config={path}"], prog="x")
    assert config.optimizer.learning_rate == 1e-4
    path.write_text("data: a\nrun_dir: b\noverlong: dorp\n")
    with pytest.raises(SystemExit) as stopped:
        cli.parse(SFTConfig, ["--config", str(path)], prog="x")
    assert stopped.value.code == 2
    assert "dorp" in capsys.readouterr().err


def test_a_written_configuration_reads_back(stages):
    path = Path(stages.ppo.run_dir).parent / "again.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(stages.ppo)))))
    assert cli.parse(PPOConfig, ["--config", str(path)], prog="x") == stages.ppo


def test_required_options_may_come_from_flags(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("steps: 3\n")
    config = cli.parse(
        SFTConfig, ["--config", str(path), "--data", "x", "--run-dir", "y"], prog="x"
    )
    assert (config.steps, config.data) == (3, "x")
    assert config.model is not tyro.MISSING


def test_generate_writes_answers(stages, tmp_path):
    output = tmp_path / "answers.jsonl"
    cli.main(
        [
            *("generate", "--model", stages.ppo.policy, "--data", stages.ppo.data),
            *("--limit", "3", "--samples", "2", "--max-new-tokens", "5"),
            *("--output", str(output)),
        ]
    )
    answers = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert len(answers) == 6
    assert [row["sample"] for row in answers] == [0, 0, 0, 1, 1, 1]
    assert answers[0]["prompt"] == answers[3]["prompt"]


def test_greedy_generation_is_the_same_for_every_seed(stages, capsys):
    def answer(seed: str) -> str:
        cli.main(
            [
                *("generate", "--model", stages.ppo.policy, "--temperature", "0"),
                *("--prompt", "Review of the film The Sea:"),
                *("--max-new-tokens", "5", "--seed", seed),
            ]
        )
        return capsys.readouterr().out

    assert answer("0") == answer("1")


def test_evaluate_reports_all_three_kinds(stages, tmp_path):
    output = tmp_path / "figures.json"
    cli.main(
        [
            *("evaluate", "--model", stages.ppo.policy),
            *("--reward-model", stages.ppo.reward_model),
            *("--reference", stages.ppo.policy),
            *("--data", stages.sft.data, "--pairs", stages.reward.data),
            *("--prompts", stages.ppo.data, "--limit", "10"),
            *("--max-tokens", "96", "--max-new-tokens", "5", "--batch-size", "4"),
            *("--output", str(output)),
        ]
    )
    figures = json.loads(output.read_text("utf-8"))
    assert figures["prompts"] == 10 and figures["pairs"] == 10
    assert 0 <= figures["pairs/accuracy"] <= 1
    assert figures["texts/perplexity"] > 1
    assert abs(figures["prompts/kl_sequence"]) < 1e-4  # policy and reference are equal
    assert 0 < figures["prompts/length_mean"] <= 5


def test_evaluate_asks_reward_functions(stages, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def every_other(prompts, responses, columns):\n    return columns['pays']\n"
    )
    lines = Path(stages.ppo.data).read_text("utf-8").splitlines()[:4]
    data = tmp_path / "problems.jsonl"
    rows = [json.loads(line) | {"pays": i % 2} for i, line in enumerate(lines)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    output = tmp_path / "figures.json"
    cli.main(
        [
            *("evaluate", "--model", stages.ppo.policy, "--prompts", str(data)),
            *("--reward", f"{rewards}:every_other", "--samples", "2"),
            *("--max-tokens", "96", "--max-new-tokens", "5", "--batch-size", "4"),
            *("--output", str(output)),
        ]
    )
    figures = json.loads(output.read_text("utf-8"))
    assert figures["prompts"] == 4
    # The function pays for two of the four prompts, whatever is answered.
    assert figures["prompts/reward/every_other"] == 0.5
    assert figures["prompts/pass_at_1"] == figures["prompts/pass_at_2"] == 0.5


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--reward-memory-limit 0.001", "--reward-memory-limit is 0.001 GiB: try more"),
        ("--reward-memory-limit 0", "reward-memory-limit=0.0"),
        ("--reward-time-limit 1e10", "reward-time-limit=10000000000.0"),
    ],
)
def test_evaluate_limits_reward_functions(complaint, stages, flags, named):
    message = complaint(
        *("evaluate", "--model", stages.ppo.policy, "--prompts", stages.ppo.data),
        *("--reward", "rlhf_jax.tasks.verifiable:exact_answer", *flags.split()),
    )
    assert named in message

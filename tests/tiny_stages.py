"""Fixtures: a few reviews, and models trained on them for a handful of steps."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from rlhf_jax import cli
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import FreshModelConfig, OptimizerConfig
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.recipes import ppo, reward_model, sft
from rlhf_jax.tasks import reviews

TINY = FreshModelConfig(
    vocab_size=300, width=32, num_layers=2, num_heads=2, max_positions=96
)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
LETTER_REWARDS = Path(__file__).with_name("letter_rewards.py")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Configurations of three tiny runs, and the models of the first two."""

    sft: SFTConfig
    reward: RewardConfig
    ppo: PPOConfig


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Stages:
    root = tmp_path_factory.mktemp("stages")
    demonstrations = reviews.make_demonstrations(0, 60)
    sft_config = SFTConfig(
        run_dir=str(root / "sft"),
        data=write_rows(
            root / "sft.jsonl",
            [{"prompt": r.prompt, "completion": r.response} for r in demonstrations],
        ),
        eval_fraction=0.2,
        fresh=TINY,
        max_tokens=96,
        steps=4,
        batch_size=8,
        eval_every=2,
        checkpoint_every=3,
        quiet=True,
    )
    pairs = reviews.make_preferences(1, 60)
    reward_config = RewardConfig(
        run_dir=str(root / "reward"),
        data=write_rows(
            root / "pairs.jsonl",
            [
                {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
                for p in pairs
            ],
        ),
        model=str(root / "sft" / "model"),
        eval_fraction=0.2,
        max_tokens=96,
        steps=3,
        batch_size=8,
        eval_every=2,
        quiet=True,
    )
    ppo_config = PPOConfig(
        run_dir=str(root / "ppo"),
        policy=str(root / "sft" / "model"),
        reward_model=str(root / "reward" / "model"),
        data=write_rows(
            root / "prompts.jsonl",
            [{"prompt": prompt} for prompt in reviews.make_prompts(2, 40)],
        ),
        eval_fraction=0.2,
        eval_prompts=10,
        updates=4,
        batch_size=8,
        epochs=2,
        minibatches=2,
        max_new_tokens=12,
        eval_every=2,
        checkpoint_every=3,
        quiet=True,
    )
    sft.run(sft_config)
    reward_model.run(reward_config)
    return Stages(sft=sft_config, reward=reward_config, ppo=ppo_config)


@pytest.fixture(scope="session")
def ppo_run(stages):
    return ppo.run(stages.ppo)


@pytest.fixture(scope="session")
def grpo_config(stages, tmp_path_factory) -> GRPOConfig:
    """Learns to write e's, which shows within a few updates of milliseconds."""
    root = tmp_path_factory.mktemp("grpo")
    prompts = reviews.make_prompts(2, 40)
    return GRPOConfig(
        run_dir=str(root / "run"),
        policy=stages.ppo.policy,
        data=write_rows(
            root / "problems.jsonl", [{"prompt": x, "copy": x} for x in prompts]
        ),
        reward=(f"{LETTER_REWARDS}:letters",),
        reward_processes=1,
        eval_fraction=0.2,
        eval_prompts=8,
        eval_every=1,
        updates=2,
        group_size=2,
        batch_size=16,
        max_new_tokens=12,
        optimizer=OptimizerConfig(
            learning_rate=0.03, schedule="constant", warmup_fraction=0.0
        ),
        quiet=True,
    )


@pytest.fixture
def compilations():
    """Durations of all compilations while the test runs."""
    found = []

    def listen(event: str, duration: float, **_):
        if event == COMPILE_EVENT:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def complaint(capsys):
    """Runs a command that must end as user errors do; returns its one line."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("rlhf-jax: error: ")
        return lines[0]

    return run


@pytest.fixture
def refused(complaint, compilations):
    """`complaint`, of a command that is refused before anything is compiled."""

    def run(*arguments: object) -> str:
        line = complaint(*arguments)
        assert compilations == []
        return line

    return run

"""The four stages through adapters: what is trained, what is shared, what is left."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rlhf_jax.models import load_pretrained
from rlhf_jax.recipes import grpo, ppo, reward_model, sft
from rlhf_jax.recipes.configs import SFTConfig
from rlhf_jax.runtime.config import OptimizerConfig
from rlhf_jax.runtime.lora_config import LoraConfig
from rlhf_jax.runtime.metrics import read_metrics

FAST = OptimizerConfig(learning_rate=0.03, schedule="constant", warmup_fraction=0.0)
LORA = LoraConfig(rank=4, alpha=8)


def vector(path, head="lm"):
    return np.asarray(ravel_pytree(load_pretrained(Path(path), head=head)[1])[0])


@pytest.fixture(scope="module")
def sft_lora(stages, tmp_path_factory) -> SFTConfig:
    return dataclasses.replace(
        stages.sft,
        run_dir=str(tmp_path_factory.mktemp("lora") / "sft"),
        model=stages.ppo.policy,
        fresh=type(stages.sft.fresh)(),
        optimizer=FAST,
        lora=LORA,
    )


def test_sft(sft_lora):
    run = sft.run(sft_lora)
    rows = read_metrics(run.metrics)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert np.abs(vector(run.model) - vector(sft_lora.model)).max() > 1e-3


def test_reward(stages, tmp_path):
    config = dataclasses.replace(
        stages.reward, run_dir=str(tmp_path / "run"), optimizer=FAST, lora=LORA
    )
    run = reward_model.run(config)
    vector(run.model, "reward")


def test_ppo(stages, tmp_path, compilations):
    config = dataclasses.replace(
        stages.ppo, run_dir=str(tmp_path / "run"), lora=LORA, actor_optimizer=FAST
    )
    run = ppo.run(config)
    rows = read_metrics(run.metrics)
    assert rows[1]["policy/first_clip_fraction"] == 0.0
    assert abs(rows[1]["kl/sequence"]) < 1e-4
    assert rows[-1]["kl/sequence"] > 1e-3


def test_grpo(grpo_config, tmp_path):
    config = dataclasses.replace(grpo_config, run_dir=str(tmp_path / "run"), lora=LORA)
    run = grpo.run(config)
    rows = read_metrics(run.metrics)
    assert rows[-1]["policy/approx_kl"] > 0

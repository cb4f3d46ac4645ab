"""Memory and time of an update, on all parameters and with adapters."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.train_state import TrainState, step_keys
from rlhf_jax.recipes import ppo
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.recipes.policy_models import FourModels
from rlhf_jax.recipes.ppo import Programs
from rlhf_jax.recipes.prompt_batches import read_prompt_data
from rlhf_jax.run.devices import make_mesh, put_batch


@dataclasses.dataclass
class Update:
    """Successive PPO updates on the same prompts."""

    models: FourModels
    programs: Programs
    prompts: Any
    state: TrainState

    def step(self) -> dict[str, float]:
        """Seconds of one update and of its last part, and its response tokens."""
        began = time.perf_counter()
        key, _ = step_keys(self.state)
        actor = self.models.actor(self.state.params.actor)
        rollout = self.programs.sample(key, actor, self.prompts)
        scores, _ = self.programs.score(self.models.reward, rollout)
        models = self.models
        experience, *_ = jax.block_until_ready(
            self.programs.experience(
                self.state, models.frozen, models.reference, scores, rollout
            )
        )
        scored = time.perf_counter()
        self.state, _ = jax.block_until_ready(
            self.programs.update(self.state, experience, self.models.frozen)
        )
        ended = time.perf_counter()
        return {
            "step_s": ended - began,
            "update_s": ended - scored,
            "tokens": float(jnp.sum(rollout.lengths)),
        }


@functools.cache
def load(config: PPOConfig) -> Update:
    """The models and compiled programs of a run, as in `rlhf-jax ppo`."""
    tokenization = Tokenization.load(config.policy)
    data = read_prompt_data(config, tokenization)
    mesh = make_mesh()
    setup = ppo.setup(
        config,
        Networks(config, mesh),
        stop_ids=tokenization.stop_ids(config.stop),
        pad_id=tokenization.pad_id,
    )
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)
    prompts = put_batch(mesh, batches[0].prompts)
    return Update(setup.models, setup.programs, prompts, setup.state)


def bytes_of(config: PPOConfig) -> dict[str, int]:
    """Bytes kept by one update; shared arrays count once."""
    update = load(config)
    state, models = update.state, update.models
    frozen = (models.frozen, models.reference, models.reward)
    trained = _size(state.params)
    return {
        "trained_bytes": trained,
        "gradient_bytes": trained,
        "optimizer_bytes": _size(state.opt_state),
        "frozen_bytes": _size(frozen),
    }


def _size(tree: Any) -> int:
    arrays = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(tree)}
    return sum(arrays.values())


def time_updates(
    configs: Mapping[str, PPOConfig], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians over alternating updates, after one that compiles."""
    steps: dict[str, Callable[[], dict[str, float]]] = {
        name: load(config).step for name, config in configs.items()
    }
    for step in steps.values():
        step()
    samples = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(step())
    return {
        name: {
            "step_s": statistics.median(row["step_s"] for row in found),
            "update_s": statistics.median(row["update_s"] for row in found),
            "update_tokens_per_s": statistics.median(
                row["tokens"] / row["update_s"] for row in found
            ),
        }
        for name, found in samples.items()
    }

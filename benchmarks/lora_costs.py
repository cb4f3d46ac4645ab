"""What an update costs: bytes that are kept, and seconds, in full and by adapters."""

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
from rlhf_jax.learner.train_state import TrainState, init_train_state, step_keys
from rlhf_jax.recipes.networks import place_state
from rlhf_jax.recipes.optimizers import make_optimizers
from rlhf_jax.recipes.policy_models import FourModels, load_four_models
from rlhf_jax.recipes.ppo import Programs, make_programs
from rlhf_jax.recipes.prompt_batches import read_prompt_data
from rlhf_jax.run.devices import make_mesh, put_batch


@dataclasses.dataclass
class Update:
    """One PPO update after the other, on the same prompts."""

    models: FourModels
    programs: Programs
    prompts: Any
    state: TrainState

    def step(self) -> dict[str, float]:
        """Seconds of one update and of its last part, and its answer tokens."""
        began = time.perf_counter()
        key, _ = step_keys(self.state)
        actor = self.models.actor(self.state.params.actor)
        rollout = self.programs.sample(key, actor, self.prompts)
        scores, _ = self.programs.score(self.models.reward, rollout)
        experience, _, _ = jax.block_until_ready(
            self.programs.experience_of(
                self.state, self.models.frozen, self.models.reference, scores, rollout
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
    """The models of a run and its compiled programs, as `rlhf-jax ppo` has them."""
    tokenization = Tokenization.load(config.policy)
    data = read_prompt_data(config, tokenization, stage="ppo")
    mesh = make_mesh()
    models, params = load_four_models(
        config, tokenization, mesh, prompt_width=data.width
    )
    optimizers, _ = make_optimizers(config)
    state = init_train_state(
        jax.random.key(config.seed), params, optimizers, kl_coef=config.kl.coef
    )
    state, sharding = place_state(state, mesh)
    programs = make_programs(
        config,
        models,
        optimizers,
        stop_ids=tokenization.stop_ids(config.stop),
        pad_id=tokenization.pad_id,
        state_sharding=sharding,
    )
    batches = data.batches(batch_size=config.batch_size, seed=config.seed)
    return Update(models, programs, put_batch(mesh, batches[0].prompts), state)


def bytes_of(config: PPOConfig) -> dict[str, int]:
    """Bytes of what one update keeps; arrays that are shared count once."""
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
    """Medians over updates, taken in turn after one that compiles."""
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

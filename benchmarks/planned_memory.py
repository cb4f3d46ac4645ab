"""The memory planned by `rlhf-jax inspect`, compared with measured memory.

    python benchmarks/planned_memory.py
    python benchmarks/planned_memory.py --layers 12 --batch 32 --remat

A random GPT-2 is saved; its stages are planned from its `config.json`, then a few steps
of `sft` and `ppo` run with the recipes' programs. On CPU, memory is the growth of the
process's anonymous memory, starting after compilation and before any array is
allocated; on an accelerator, it is the device's peak.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import timing
from process_memory import PeakMemory, give_back, memory

from rlhf_jax.algo.types import Demonstrations, Prompts
from rlhf_jax.config.inspection import InspectConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.learner.train_state import step_keys
from rlhf_jax.models import save_pretrained
from rlhf_jax.models.config import DecoderConfig, gpt2_config
from rlhf_jax.models.tiny import byte_tokenizer
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.recipes.networks import Networks
from rlhf_jax.run.devices import make_mesh, put_batch
from rlhf_jax.tools.memory_plan import StageMemory, stage_memory

STEPS = 2


def save_model(directory: Path, layers: int, width: int, vocab_size: int) -> Any:
    """A language model and a reward model; their shape."""
    shape = gpt2_config(
        vocab_size=vocab_size,
        max_positions=1024,
        width=width,
        num_layers=layers,
        num_heads=width // 64,
    )
    for head in ("lm", "reward"):
        module = Transformer(shape, head=head)
        ones = jnp.ones((1, 2), jnp.int32)
        params = module.init(jax.random.key(0), ones, ones == 1)["params"]
        save_pretrained(directory / head, module, params, tokenizer=byte_tokenizer())
    return shape


def sft_steps(config: SFTConfig, shape: DecoderConfig) -> Callable[[], None]:
    """A few steps of stage 1; each call starts from the files."""
    mesh, updates = make_mesh(), []
    tokens = jnp.ones((config.batch_size, config.max_tokens), jnp.int32)
    real = jnp.ones(tokens.shape, bool)
    batch = Demonstrations(tokens=tokens, mask=real, target_mask=real)

    def run() -> None:
        setup = sft.setup(config, Networks(config, mesh), shape)
        if not updates:
            updates.append(setup.update)
        state = setup.state
        del setup
        for _ in range(STEPS):
            state, metrics = updates[0](state, put_batch(mesh, batch))
            jax.block_until_ready(metrics)

    return run


def ppo_steps(config: PPOConfig) -> Callable[[], None]:
    """A few updates of stage 3; each call starts from the files."""
    mesh, programs = make_mesh(), []

    def run() -> None:
        setup = ppo.setup(config, Networks(config, mesh), stop_ids=(), pad_id=0)
        if not programs:
            programs.append(setup.programs)
        state, models = setup.state, setup.models
        del setup
        prompts = Prompts(
            tokens=jnp.ones((config.batch_size, config.max_prompt_tokens), jnp.int32),
            lengths=jnp.full(config.batch_size, config.max_prompt_tokens, jnp.int32),
        )
        for _ in range(STEPS):
            key, _ = step_keys(state)
            actor = models.actor(state.params.actor)
            rollout = programs[0].sample(key, actor, put_batch(mesh, prompts))
            del actor
            scores, _ = programs[0].score(models.reward, rollout)
            experience, *_ = programs[0].experience(
                state, models.frozen, models.reference, scores, rollout
            )
            state, _ = programs[0].update(state, experience, models.frozen)
            jax.block_until_ready(state)

    return run


def measured(run: Callable[[], None]) -> int:
    """Peak bytes of the second of two calls; the first compiles."""
    run()
    give_back()
    if jax.default_backend() != "cpu":
        return timing.device_peak_bytes() or 0
    before = memory("RssAnon")
    sampler = PeakMemory()
    sampler.start()
    run()
    return sampler.stop() - before


def planned(stage: str, config: InspectConfig, shape: Any) -> StageMemory:
    """The command's plan."""
    return stage_memory(
        config.of_stage(stage),  # pyright: ignore[reportArgumentType]
        shape,
        make_mesh(),
        stop_ids=(),
        pad_id=0,
        compile_programs=True,
        report=lambda text: None,
    )


def main() -> None:
    """Both stages, as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", default=["sft", "ppo"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.layers, arguments.width, arguments.vocab_size = 2, 64, 512
        arguments.batch, arguments.prompt, arguments.response = 4, 16, 16
    machine = timing.machine()
    timing.print_machine(machine)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        size = (arguments.layers, arguments.width, arguments.vocab_size)
        shape = save_model(Path(name), *size)
        config = InspectConfig(
            model=f"{name}/lm",
            batch_size=arguments.batch,
            max_tokens=arguments.prompt + arguments.response,
            max_prompt_tokens=arguments.prompt,
            max_new_tokens=arguments.response,
            remat=arguments.remat,
        )
        for stage in arguments.stages:
            plan = planned(stage, config, shape)
            of_stage = config.of_stage(stage)
            if isinstance(of_stage, PPOConfig):
                reward = f"{name}/reward"
                run = ppo_steps(dataclasses.replace(of_stage, reward_model=reward))
            else:
                assert isinstance(of_stage, SFTConfig)
                run = sft_steps(of_stage, shape)
            taken = measured(run)
            rows.append(
                {
                    "stage": stage,
                    "planned_always_bytes": plan.always,
                    "planned_peak_bytes": plan.peak,
                    "measured_peak_bytes": taken,
                    "measured_over_planned": taken / plan.peak,
                }
            )
            print(
                f"{stage:4} planned {plan.peak / 1e6:8,.0f} MB, of which always "
                f"{plan.always / 1e6:6,.0f} MB; measured {taken / 1e6:8,.0f} MB, "
                f"{taken / plan.peak:.2f} times",
                flush=True,
            )
    timing.print_result({"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()

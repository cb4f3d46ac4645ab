"""The memory of each stage per device: counted, and as planned by the compiler."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Demonstrations, Preferences, Prompts, Sequences
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import RunConfig
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.learner.train_state import TrainState, behavior_policy, step_keys
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.recipes import grpo, ppo, reward_model, sft
from rlhf_jax.recipes.group_sampling import ScoredResponses
from rlhf_jax.recipes.grpo import GRPOSetup
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.ppo import PPOSetup
from rlhf_jax.recipes.supervised_run import SupervisedSetup
from rlhf_jax.tools.abstract_run import (
    AbstractNetworks,
    bytes_per_device,
    cache_bytes,
    flags,
    place,
    spread,
    tokens,
    with_shardings,
)

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """Memory of one program besides resident memory, in bytes per device.

    Attributes:
        name: name of the program.
        batch: arguments that are not resident.
        parts: counted parts of `temporary`, by name.
        temporary: temporary memory of the program.
        results: outputs that do not alias an argument.
        seconds: time of tracing and compiling.
    """

    name: str
    batch: int
    parts: dict[str, int]
    temporary: int
    results: int
    seconds: float

    @property
    def rest(self) -> int:
        """Other temporary arrays, mostly activations."""
        return max(0, self.temporary - sum(self.parts.values()))

    @property
    def total(self) -> int:
        """Batch, temporary arrays and results."""
        return self.batch + self.temporary + self.results


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of a stage, in bytes per device.

    Attributes:
        stage: the command.
        resident: memory held throughout the run, by name.
        gradients: gradients of trainable parameters; part of the update's memory.
        cache: KV cache of a rollout; part of the rollout's memory.
        programs: compiled programs; empty without compilation.
    """

    stage: str
    resident: dict[str, int]
    gradients: int
    cache: int
    programs: tuple[ProgramMemory, ...] = ()

    @property
    def always(self) -> int:
        """Total resident memory."""
        return sum(self.resident.values())

    @property
    def peak(self) -> int:
        """Peak memory; without programs, a lower bound."""
        counted = max(self.gradients, self.cache)
        return self.always + max([p.total for p in self.programs], default=counted)


class _Compiler:
    """Compiles programs of sharded shapes in sequence, and adds up their memory."""

    def __init__(self, stage: str, report: Report, resident: Any, *, is_on: bool):
        self.programs: list[ProgramMemory] = []
        self._stage = stage
        self._report = report
        self._resident = {id(leaf) for leaf in jax.tree.leaves(resident)}
        self.is_on = is_on

    def run(self, name: str, program: Any, *arguments: Any, **parts: int) -> Any:
        """The program's results, as sharded shapes.

        Args:
            name: name of the program.
            program: a jitted function.
            *arguments: its arguments; resident leaves are not counted again.
            **parts: counted parts of its temporary memory.
        """
        self._report(f"{self._stage}: compiling {name} …")
        began = time.perf_counter()
        lowered = program.lower(*arguments)
        compiled = lowered.compile()
        found = compiled.memory_analysis()
        fresh = [
            leaf
            for leaf in jax.tree.leaves(arguments)
            if id(leaf) not in self._resident
        ]
        memory = ProgramMemory(
            name=name,
            batch=bytes_per_device(fresh),
            parts={name.replace("_", " "): size for name, size in parts.items()},
            temporary=found.temp_size_in_bytes,
            results=max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
            seconds=time.perf_counter() - began,
        )
        self.programs.append(memory)
        return with_shardings(lowered.out_info, compiled.output_shardings)


def stage_memory(
    config: RunConfig,
    shape: DecoderConfig,
    mesh: Mesh,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    compile_programs: bool,
    report: Report,
) -> StageMemory:
    """Memory of a stage, as used by its own command.

    Args:
        config: validated configuration.
        shape: shape of all models.
        mesh: mesh of local or simulated devices.
        stop_ids: stop tokens.
        pad_id: padding token.
        compile_programs: whether to include the compiler's plan.
        report: called with a line before each compilation.
    """
    networks = AbstractNetworks(config, shape, mesh)
    compiler = partial(_Compiler, config.stage, report, is_on=compile_programs)
    ids: dict[str, Any] = {"stop_ids": stop_ids, "pad_id": pad_id}
    match config:
        case SFTConfig():
            return _supervised(
                config, sft.setup(config, networks, shape), mesh, compiler
            )
        case RewardConfig():
            return _supervised(
                config, reward_model.setup(config, networks), mesh, compiler
            )
        case PPOConfig():
            return _policy_stage(ppo.setup(config, networks, **ids), mesh, compiler)
        case GRPOConfig():
            return _policy_stage(grpo.setup(config, networks, **ids), mesh, compiler)
    raise TypeError(f"{type(config).__name__} is not the configuration of a stage")


def _supervised(
    config: SFTConfig | RewardConfig,
    setup: SupervisedSetup,
    mesh: Mesh,
    compiler: Callable[..., _Compiler],
) -> StageMemory:
    rows = (config.batch_size, config.max_tokens)
    sequences = Sequences(tokens=tokens(*rows), mask=flags(*rows))
    if isinstance(config, SFTConfig):
        batch: Any = Demonstrations(**vars(sequences), target_mask=flags(*rows))
    else:
        batch = Preferences(chosen=sequences, rejected=sequences)
    state, network = setup.state, setup.network
    gradients = bytes_per_device(state.params)
    compiled = compiler((state, network.frozen))
    if compiled.is_on:
        arguments = (state, spread(batch, mesh), network.frozen)
        compiled.run("update", setup.update, *arguments, gradients=gradients)
    return StageMemory(
        stage=config.stage,
        resident=_resident(state, {"frozen model": network.frozen}),
        gradients=gradients,
        cache=0,
        programs=tuple(compiled.programs),
    )


def _policy_stage(
    setup: PPOSetup | GRPOSetup, mesh: Mesh, compiler: Callable[..., _Compiler]
) -> StageMemory:
    """The programs of one update, each with the results of those before it."""
    config, models, state = setup.config, setup.models, setup.state
    prompts = spread(
        Prompts(
            tokens=tokens(config.batch_size, config.max_prompt_tokens),
            lengths=tokens(config.batch_size),
        ),
        mesh,
    )
    actor = _sampled_policy(models, state, mesh)
    length = config.max_prompt_tokens + config.max_new_tokens - 1
    cache = cache_bytes(models, actor, prompts, length, mesh)
    gradients = bytes_per_device(state.params)
    compiled = compiler((state, models.frozen, models.reference, models.reward))
    if compiled.is_on:
        programs = setup.programs
        key = place(jax.eval_shape(step_keys, state)[0], mesh)
        rollout = compiled.run(
            "rollout", programs.sample, key, actor, prompts, KV_cache=cache
        )
        scores, _ = compiled.run("reward model", programs.score, models.reward, rollout)
        judged = (scores, rollout)
        if isinstance(config, GRPOConfig):
            judged = (ScoredResponses(rollout=rollout, scores=scores), None)
        arguments = (state, models.frozen, models.reference, *judged)
        experience, *_ = compiled.run("scoring", programs.experience, *arguments)
        arguments = (state, experience, models.frozen)
        compiled.run("update", programs.update, *arguments, gradients=gradients)
    frozen = {
        "frozen policy": models.frozen.actor,  # with adapters, also the reference
        "reference": models.reference,
        "reward model": models.reward,  # with adapters, also below the critic
        "frozen critic": models.frozen.critic,
    }
    return StageMemory(
        stage=config.stage,
        resident=_resident(state, frozen),
        gradients=gradients,
        cache=cache,
        programs=tuple(compiled.programs),
    )


def _sampled_policy(models: PolicyModels, state: TrainState, mesh: Mesh) -> Any:
    """The full behavior policy; resident arrays are kept."""
    trained = behavior_policy(state)
    if models.lora is None:
        return trained
    # Scaled adapters are new arrays; the rest is shared.
    whole = place(jax.eval_shape(models.actor, trained), mesh)
    return _shared(whole, models.frozen.actor)


def _shared(whole: Any, frozen: Any) -> Any:
    """A tree with the leaves of the frozen one, where it has them."""
    if not isinstance(whole, dict):
        return whole if frozen is None else frozen
    known = frozen or {}
    return {name: _shared(leaf, known.get(name)) for name, leaf in whole.items()}


def _resident(state: Any, frozen: dict[str, Any]) -> dict[str, int]:
    """Bytes by name; shared arrays count only for the first."""
    groups = {
        "trained parameters": state.params,
        "optimizer": state.opt_state,
        "other state": dataclasses.replace(state, params=None, opt_state=None),
        **frozen,
    }
    seen: set[int] = set()
    found = {}
    for name, tree in groups.items():
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
        found[name] = bytes_per_device([x for i, x in leaves.items() if i not in seen])
        seen |= leaves.keys()
    return {name: size for name, size in found.items() if size}

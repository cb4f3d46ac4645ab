"""The memory of each stage on each device: counted, and as the compiler plans it."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Demonstrations, Preferences, Prompts, Sequences
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.inspection import StageConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.learner.imitation import count_targets, imitation_objective
from rlhf_jax.learner.preference import count_pairs, preference_objective
from rlhf_jax.learner.supervised_step import make_supervised_step
from rlhf_jax.learner.train_state import (
    ActorCritic,
    TrainState,
    init_model_state,
    init_train_state,
    step_keys,
)
from rlhf_jax.models.callables import policy, reward_model
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.recipes.group_sampling import GRPOPrograms, Judged
from rlhf_jax.recipes.grpo import make_grpo_programs
from rlhf_jax.recipes.networks import assembling
from rlhf_jax.recipes.optimizers import (
    make_grpo_optimizers,
    make_optimizers,
    optimizer_of,
)
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.ppo import Programs, make_programs
from rlhf_jax.tools.abstract_run import (
    AbstractNetworks,
    bytes_per_device,
    cache_bytes,
    flags,
    four_models,
    place,
    policy_models,
    spread,
    tokens,
    with_shardings,
)

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """What one program takes on top of what is always there, in bytes per device.

    Attributes:
        name: of the program.
        batch: arguments that are not always there.
        parts: counted parts of `temporary`, by name.
        temporary: all that the program needs while it runs.
        results: outputs that take the place of no argument.
        seconds: of tracing and compiling.
    """

    name: str
    batch: int
    parts: dict[str, int]
    temporary: int
    results: int
    seconds: float

    @property
    def rest(self) -> int:
        """Temporary arrays that are none of the parts: mostly activations."""
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
        resident: what is there from the start to the end, by name.
        gradients: of what is trained; part of what the update takes.
        cache: keys and values of a whole rollout; part of what that takes.
        programs: as compiled; empty where nothing was.
    """

    stage: str
    resident: dict[str, int]
    gradients: int
    cache: int
    programs: tuple[ProgramMemory, ...] = ()

    @property
    def always(self) -> int:
        """The sum of what is resident."""
        return sum(self.resident.values())

    @property
    def peak(self) -> int:
        """The most that is held at once; without programs, a lower bound."""
        counted = max(self.gradients, self.cache)
        return self.always + max([p.total for p in self.programs], default=counted)


class _Compiler:
    """Compiles programs of placed shapes one after the other, and adds up."""

    def __init__(self, stage: str, report: Report, resident: Any, *, is_on: bool):
        self.programs: list[ProgramMemory] = []
        self._stage = stage
        self._report = report
        self._resident = {id(leaf) for leaf in jax.tree.leaves(resident)}
        self.is_on = is_on

    def run(self, name: str, program: Any, *arguments: Any, **parts: int) -> Any:
        """What the program gives back, as placed shapes.

        Args:
            name: of the program.
            program: a jitted function.
            *arguments: of it; leaves that are resident are not counted again.
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
    stage: str,
    config: StageConfig,
    shape: DecoderConfig,
    mesh: Mesh,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    compile_programs: bool,
    report: Report,
) -> StageMemory:
    """Memory of a stage as its own command would take it.

    Args:
        stage: the command.
        config: of the run, checked.
        shape: of all of its models.
        mesh: of this machine's devices, or of simulated ones.
        stop_ids: tokens that end an answer.
        pad_id: fills up rows.
        compile_programs: whether to ask the compiler.
        report: is told what is being compiled.
    """
    networks = AbstractNetworks(config, shape, mesh)
    compiler = partial(_Compiler, stage, report, is_on=compile_programs)
    if isinstance(config, SFTConfig | RewardConfig):
        return _supervised(config, networks, mesh, stage, compiler)
    ids = {"stop_ids": stop_ids, "pad_id": pad_id}
    if isinstance(config, PPOConfig):
        return _ppo(config, networks, mesh, compiler, **ids)
    return _grpo(config, networks, mesh, compiler, **ids)


def _supervised(
    config: SFTConfig | RewardConfig,
    networks: AbstractNetworks,
    mesh: Mesh,
    stage: str,
    compiler: Callable[..., _Compiler],
) -> StageMemory:
    rows = (config.batch_size, config.max_tokens)
    sequences = Sequences(tokens=tokens(*rows), mask=flags(*rows))
    if isinstance(config, SFTConfig):
        network, trained = networks.trained("lm")
        objective = imitation_objective(policy(network.module).token_logprobs)
        count: Callable = count_targets
        batch: Any = Demonstrations(**vars(sequences), target_mask=flags(*rows))
    else:
        network, trained = networks.trained("reward")
        objective = preference_objective(
            reward_model(network.module),
            label_smoothing=config.label_smoothing,
            center_coef=config.center_coef,
        )
        count, batch = count_pairs, Preferences(chosen=sequences, rejected=sequences)
    optimizer, _ = optimizer_of(config.optimizer, total_steps=config.steps)
    init = partial(init_model_state, optimizer=optimizer)
    state = place(jax.eval_shape(init, jax.random.key(0), trained), mesh)
    step = make_supervised_step(
        objective,
        optimizer,
        count=count,
        num_microbatches=config.microbatches,
        assemble=None if network.lora is None else assembling(network.lora),
        state_sharding=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    gradients = bytes_per_device(state.params)
    compiled = compiler((state, network.frozen))
    if compiled.is_on:
        arguments = (state, spread(batch, mesh), network.frozen)
        compiled.run("update", step, *arguments, gradients=gradients)
    return StageMemory(
        stage=stage,
        resident=_resident(state, {"frozen model": network.frozen}),
        gradients=gradients,
        cache=0,
        programs=tuple(compiled.programs),
    )


def _ppo(
    config: PPOConfig,
    networks: AbstractNetworks,
    mesh: Mesh,
    compiler: Callable[..., _Compiler],
    **ids: Any,
) -> StageMemory:
    models, params = four_models(config, networks)
    optimizers, _ = make_optimizers(config)
    init = partial(
        init_train_state,
        optimizers=optimizers,
        kl_coef=config.kl.coef,
        slow_critic=config.advantages.slow_critic_decay is not None,
    )
    state = place(jax.eval_shape(init, jax.random.key(0), params), mesh)
    sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs = make_programs(config, models, optimizers, state_sharding=sharding, **ids)
    return _policy_stage("ppo", config, models, state, programs, mesh, compiler)


def _grpo(
    config: GRPOConfig,
    networks: AbstractNetworks,
    mesh: Mesh,
    compiler: Callable[..., _Compiler],
    **ids: Any,
) -> StageMemory:
    models, actor = policy_models(config, networks)
    optimizers, _ = make_grpo_optimizers(config)
    init = partial(
        init_train_state,
        optimizers=optimizers,
        kl_coef=config.kl.coef,
        old_policy=config.refresh_every > 1,
    )
    params = ActorCritic(actor=actor, critic={})
    state = place(jax.eval_shape(init, jax.random.key(0), params), mesh)
    sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs = make_grpo_programs(
        config, models, optimizers, mesh=mesh, state_sharding=sharding, **ids
    )
    return _policy_stage("grpo", config, models, state, programs, mesh, compiler)


def _policy_stage(
    stage: str,
    config: PPOConfig | GRPOConfig,
    models: PolicyModels,
    state: TrainState,
    programs: Programs | GRPOPrograms,
    mesh: Mesh,
    compiler: Callable[..., _Compiler],
) -> StageMemory:
    """The programs of one update, each given what those before it give."""
    prompts = spread(
        Prompts(
            tokens=tokens(config.batch_size, config.max_prompt_tokens),
            lengths=tokens(config.batch_size),
        ),
        mesh,
    )
    actor = _answering(models, state, mesh)
    length = config.max_prompt_tokens + config.max_new_tokens - 1
    cache = cache_bytes(models, actor, prompts, length, mesh)
    gradients = bytes_per_device(state.params)
    compiled = compiler((state, models.frozen, models.reference, models.reward))
    if compiled.is_on:
        key = place(jax.eval_shape(step_keys, state)[0], mesh)
        sample, update = programs.sample, programs.update
        rollout = compiled.run("rollout", sample, key, actor, prompts, KV_cache=cache)
        scores, _ = compiled.run("reward model", programs.score, models.reward, rollout)
        judged = (scores, rollout)
        if isinstance(config, GRPOConfig):
            judged = (Judged(rollout=rollout, scores=scores), None)
        arguments = (state, models.frozen, models.reference, *judged)
        experience, _, _ = compiled.run("scoring", programs.experience_of, *arguments)
        arguments = (state, experience, models.frozen)
        compiled.run("update", update, *arguments, gradients=gradients)
    frozen = {
        "frozen policy": models.frozen.actor,  # with adapters, also the reference
        "reference": models.reference,
        "reward model": models.reward,  # with adapters, also below the critic
    }
    return StageMemory(
        stage=stage,
        resident=_resident(state, frozen),
        gradients=gradients,
        cache=cache,
        programs=tuple(compiled.programs),
    )


def _answering(models: PolicyModels, state: TrainState, mesh: Mesh) -> Any:
    """The whole policy that answers; what is resident stays what it is."""
    trained = state.params.actor if state.old_policy is None else state.old_policy
    if models.lora is None:
        return trained
    # Adapters, times their factor, are made anew; the rest is shared.
    whole = place(jax.eval_shape(models.actor, trained), mesh)
    return _shared(whole, models.frozen.actor)


def _shared(whole: Any, frozen: Any) -> Any:
    """A tree with the leaves of the frozen one, where that has them."""
    if not isinstance(whole, dict):
        return whole if frozen is None else frozen
    known = frozen or {}
    return {name: _shared(leaf, known.get(name)) for name, leaf in whole.items()}


def _resident(state: Any, frozen: dict[str, Any]) -> dict[str, int]:
    """Bytes by name; an array that several share counts for the first."""
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

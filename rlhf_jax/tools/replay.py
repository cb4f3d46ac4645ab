"""Runs a single step again: one that had a NaN or infinite loss or gradient."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.algo.types import Experience
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import RunConfig, from_dict
from rlhf_jax.config.supervised import RewardConfig, SFTConfig
from rlhf_jax.config.tools import ReplayConfig
from rlhf_jax.files.printable import one_line
from rlhf_jax.learner.finite import TERMS, first_nonfinite
from rlhf_jax.learner.imitation import imitation_losses
from rlhf_jax.models.callables import policy, reward_model
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.recipes import grpo, ppo, sft
from rlhf_jax.recipes import reward_model as reward_stage
from rlhf_jax.recipes.networks import Networks, fresh_shape
from rlhf_jax.recipes.policy_models import FourModels, PolicyModels
from rlhf_jax.recipes.supervised_run import SupervisedSetup
from rlhf_jax.run.checkpointer import Checkpointer
from rlhf_jax.run.devices import make_mesh, put_batch
from rlhf_jax.run.nonfinite import Dump, dump_path, dumped_steps, read_dump
from rlhf_jax.run.progress import heading, say
from rlhf_jax.run.run_directory import RunDirectory

Rows = dict[str, np.ndarray]
"""`[B]` bool by name of a quantity: the rows in which it is not finite"""
MAX_SHOWN = 8  # rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """One step, from the state before it and its batch.

    Attributes:
        terms: losses and gradient norms that must be finite, one per optimizer step.
        first: the first optimizer step in which each is not finite, or −1.
        rows: rows in which a quantity is not finite, in the batch or computed from it
            with the weights before the step.
        largest_weight: the largest absolute value of a trainable weight then.
    """

    terms: dict[str, np.ndarray]
    first: dict[str, int]
    rows: Rows
    largest_weight: float


def run(config: ReplayConfig) -> None:
    """Replays the step and prints what is found.

    Raises:
        ValueError: there is no such step, or not the state before it.
    """
    config.validate()
    directory = RunDirectory(Path(config.run_dir))
    steps = dumped_steps(directory)
    if config.step is None and not steps:
        raise ValueError(
            f"run-dir={config.run_dir!r}: nothing to replay; a step with a NaN or "
            f"infinite loss writes its batch to {directory.nonfinite}"
        )
    dump = read_dump(directory, steps[-1] if config.step is None else config.step)
    heading(f"{dump_path(directory, dump.step)}: {dump.error}")
    for line in describe(replay(directory, dump), dump):
        say(line)


def replay(directory: RunDirectory, dump: Dump) -> Replay:
    """Runs the step of a dump on the state before it.

    Raises:
        ValueError: there is no checkpoint of that state.
    """
    config = _config(dump)
    _check_saved(directory, dump.step - 1)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    setup, update, frozen, evidence = _program(config, dump, Networks(config, mesh))
    state = setup.state
    if dump.step > 1:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        with Checkpointer(directory.checkpoints) as checkpointer:
            state = checkpointer.restore(dump.step - 1, like)[0]
    batch = put_batch(mesh, dump.batch)
    rows = {name: _bad_rows(x) for name, x in _arrays(dump.batch).items()}
    rows |= {
        f"{name} before the step": _bad_rows(x)
        for name, x in jax.device_get(jax.jit(evidence)(state.params, batch)).items()
    }
    weights = jax.tree.leaves(state.params)
    largest = max(float(np.abs(jax.device_get(leaf)).max()) for leaf in weights)
    _, metrics = update(state, batch, frozen)
    metrics = jax.device_get(metrics)
    return Replay(
        terms={
            name.removeprefix(TERMS): value
            for name, value in metrics.items()
            if name.startswith(TERMS)
        },
        first=first_nonfinite(metrics),
        rows=rows,
        largest_weight=largest,
    )


def _config(dump: Dump) -> RunConfig:
    """The configuration of the run, checked like one from flags."""
    stages = {"sft": SFTConfig, "reward": RewardConfig}
    stages |= {"ppo": PPOConfig, "grpo": GRPOConfig}
    try:
        config = from_dict(stages[dump.stage], dump.config)
        config.validate()
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"the dump of step {dump.step} has no configuration of a run "
            f"({one_line(error)}); replay another --step"
        ) from None
    return config


def describe(found: Replay, dump: Dump) -> list[str]:
    """What was found, in lines of text."""
    lines = [f"largest weight before the step: {found.largest_weight:.3g}"]
    lines.append("optimizer step  " + "  ".join(found.terms))
    for number, values in enumerate(zip(*found.terms.values(), strict=True)):
        shown = [
            f"{value:{len(name)}.4g}"
            for name, value in zip(found.terms, values, strict=True)
        ]
        lines.append("  ".join([f"{number:14}", *shown]))
    bad = {name: step for name, step in found.first.items() if step >= 0}
    for name, step in bad.items():
        lines.append(f"{name}: not finite from optimizer step {step} on")
    if not bad:
        lines.append("all terms are finite: the failure did not happen again")
    suspects = np.zeros(len(next(iter(found.rows.values()))), bool)
    for name, rows in found.rows.items():
        if rows.any():
            lines.append(f"{name}: not finite in rows {_listed(np.flatnonzero(rows))}")
            suspects |= rows
    if not suspects.any():
        lines.append("each row alone is finite, in the batch and before the step")
    for row in np.flatnonzero(suspects)[:MAX_SHOWN]:
        if dump.prompts:
            lines.append(f"row {row}: {dump.prompts[row]!r}")
    return lines


def _check_saved(directory: RunDirectory, step: int) -> None:
    if step == 0:
        return  # the initial state, from the configuration
    with Checkpointer(directory.checkpoints) as checkpointer:
        saved = checkpointer.steps()
    if step not in saved:
        raise ValueError(
            f"step={step + 1}: the state before it, checkpoint {step}, is not in "
            f"{directory.checkpoints} any more; there are: "
            f"{', '.join(map(str, saved)) or 'none'}"
        )


def _program(
    config: RunConfig, dump: Dump, networks: Networks
) -> tuple[Any, Callable[..., Any], Any, Callable[..., dict[str, Any]]]:
    """The set-up of the stage, its update, frozen parameters, and per-row outputs."""
    ids: dict[str, Any] = {"stop_ids": (), "pad_id": 0}  # nothing is sampled
    match config:
        case SFTConfig():
            shape = (
                fresh_shape(config.fresh, vocab_size=dump.vocab_size)
                if config.model is None
                else open_checkpoint(config.model).config
            )
            setup = sft.setup(config, networks, shape)
            return setup, setup.update, setup.network.frozen, _losses(setup)
        case RewardConfig():
            setup = reward_stage.setup(config, networks)
            return setup, setup.update, setup.network.frozen, _scores(setup)
        case PPOConfig():
            setup = ppo.setup(config, networks, **ids)
        case GRPOConfig():
            setup = grpo.setup(config, networks, **ids)
        case _:
            raise TypeError(f"{type(config).__name__} is not a stage's configuration")
    models = setup.models
    return setup, setup.programs.update, models.frozen, _outputs(config, models)


def _losses(setup: SupervisedSetup) -> Callable[..., dict[str, Any]]:
    losses = imitation_losses(policy(setup.network.module).token_logprobs)
    return lambda params, batch: {"loss": losses(setup.network.whole(params), batch)}


def _scores(setup: SupervisedSetup) -> Callable[..., dict[str, Any]]:
    score = reward_model(setup.network.module)

    def scores(params: Any, batch: Any) -> dict[str, Any]:
        whole = setup.network.whole(params)

        def of(sequences: Any) -> Any:
            tokens, mask = sequences.tokens, sequences.mask
            flat = (
                tokens.reshape(-1, tokens.shape[-1]),
                mask.reshape(-1, mask.shape[-1]),
            )
            return score(whole, *flat).reshape(tokens.shape[:-1])

        if hasattr(batch, "answers"):
            return {"score": of(batch.answers)}
        return {"chosen score": of(batch.chosen), "rejected score": of(batch.rejected)}

    return scores


def _outputs(
    config: PPOConfig | GRPOConfig, models: PolicyModels
) -> Callable[..., dict[str, Any]]:
    def outputs(params: Any, batch: Experience) -> dict[str, Any]:
        whole = models.assemble(params, models.frozen)
        tokens, mask, width = batch.tokens, batch.sequence_mask, batch.mask.shape[1]
        assert tokens is not None and mask is not None
        logprobs, _ = models.policy.token_logprobs(
            whole.actor,
            tokens,
            mask,
            response_length=width,
            temperature=config.temperature,
        )
        found = {"log-probability": jax.numpy.where(batch.mask, logprobs, 0.0)}
        if isinstance(models, FourModels):
            critic = models.critic_of(whole)
            values = models.values_fn(critic, tokens, mask, response_length=width)
            found["value"] = jax.numpy.where(batch.mask, values, 0.0)
        return found

    return outputs


def _arrays(batch: Any) -> Mapping[str, np.ndarray]:
    """The arrays of a batch by name; those of an experience, on response tokens."""
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(batch)
    }
    if isinstance(batch, Experience):
        mask = np.asarray(batch.mask)
        arrays = {
            name: np.where(mask, x, 0) if x.shape == mask.shape else x
            for name, x in arrays.items()
        }
    return arrays


def _bad_rows(values: np.ndarray) -> np.ndarray:
    """`[B]`: whether a row has a value that is not finite."""
    return np.asarray(~np.isfinite(values).reshape(len(values), -1).all(axis=1))


def _listed(rows: np.ndarray) -> str:
    more = f" and {len(rows) - MAX_SHOWN} more" if len(rows) > MAX_SHOWN else ""
    return ", ".join(map(str, rows[:MAX_SHOWN])) + more

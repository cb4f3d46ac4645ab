"""State, evaluation and files of the stages that train one model."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import optax

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.supervised import SupervisedConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.gradients import Objective
from rlhf_jax.learner.supervised_step import SupervisedStep, make_supervised_step
from rlhf_jax.learner.train_state import ModelState, init_model_state
from rlhf_jax.models.hf.model_directory import replaced_directory
from rlhf_jax.recipes.networks import Network, Networks, assembling, save_trained
from rlhf_jax.recipes.optimizers import optimizer_of
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import Session
from rlhf_jax.run.stopwatch import Stopwatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedSetup:
    """Initial state and step; from an actual network, or from shapes for planning."""

    network: Network
    state: ModelState
    schedule: optax.Schedule
    update: SupervisedStep  # `(state, batch, frozen) -> (state, metrics)`, compiled


def supervised_setup(
    config: SupervisedConfig,
    networks: Networks,
    network: Network,
    params: Params,
    *,
    key: Array,
    objective: Objective,
    count: Callable[[Any], Array],
) -> SupervisedSetup:
    """Optimizer, state and compiled step for a network.

    Args:
        config: validated configuration.
        networks: shards the state.
        network: network to train.
        params: its trainable parameters; donated to the training.
        key: random key of the run.
        objective: objective to minimize.
        count: its divisor, from a whole batch.
    """
    optimizer, schedule = optimizer_of(config.optimizer, total_steps=config.steps)
    init = partial(init_model_state, optimizer=optimizer)
    state, sharding = networks.place(networks.make(init, key, params))
    update = make_supervised_step(
        objective,
        optimizer,
        count=count,
        num_microbatches=config.microbatches,
        assemble=None if network.lora is None else assembling(network.lora),
        state_sharding=sharding,
    )
    return SupervisedSetup(
        network=network, state=state, schedule=schedule, update=update
    )


class SupervisedRun(contextlib.ExitStack):
    """A run that trains one model, from the first step to the saved model.

        with SupervisedRun(config, …) as run:
            state = run.restore(state)
            run.evaluate_start(state)
            for step in run.steps():
                …
                state = run.finish(step, state, metrics, batch, clock)
            run.save(state)
        run.report()

    Args:
        config: configuration of the run.
        setup: setup of the stage.
        evaluate: computes held-out metrics from full parameters.
        tokenization: saved with the model.
        tokens_per_step: tokens of a batch, including padding.
        shown: label → metric, for the terminal.
    """

    def __init__(
        self,
        config: SupervisedConfig,
        setup: SupervisedSetup,
        *,
        evaluate: Callable[[Params], dict[str, float]],
        tokenization: Tokenization,
        tokens_per_step: int,
        shown: Mapping[str, str],
    ):
        super().__init__()
        self._config = config
        self._setup = setup
        self._evaluate = evaluate
        self._tokenization = tokenization
        self._tokens_per_step = tokens_per_step
        self._shown = shown
        self._session = Session(config)
        self.directory: RunDirectory = self._session.run

    def __enter__(self) -> "SupervisedRun":
        super().__enter__()
        self.enter_context(self._session)
        kept, is_new = self.directory.tokenizer, self._config.tokenizer_source() is None
        if is_new and not kept.is_dir() and jax.process_index() == 0:
            with replaced_directory(kept, with_tokenizer=True) as directory:
                self._tokenization.tokenizer.save_pretrained(directory)
        return self

    def restore(self, state: ModelState) -> ModelState:
        """`state`, or the checkpoint's when resuming."""
        return self._session.restore(state)

    def evaluate_start(self, state: ModelState) -> None:
        """Evaluates the model before the first step, unless the run was resumed."""
        if self._session.start_step == 0:
            self._session.log(0, self._held_out(state), shown=self._shown)

    def steps(self) -> range:
        """The remaining steps, counted from 1."""
        return self._session.steps()

    def finish(
        self,
        step: int,
        state: ModelState,
        metrics: dict[str, Array],
        batch: Any,
        clock: Stopwatch,
    ) -> ModelState:
        """Ends a step: checks that it is finite, then evaluates, logs and saves if due.

        Args:
            step: number of the step.
            state: state after it.
            metrics: metrics of the step, on device.
            batch: batch of the step.
            clock: started with the step.

        Returns:
            The state to continue with; if the step was skipped, that before it.

        Raises:
            NonFiniteError: if the loss or a gradient was not finite.
            Interrupted: after a checkpoint, when asked to stop.
        """
        session = self._session
        taken = step - 1 - session.check_finite.skipped  # optimizer steps so far
        state, found = session.check_finite(
            step,
            state,
            jax.device_get(metrics),
            batch,
            vocab_size=self._setup.network.module.config.vocab_size,
        )
        line: dict[str, Any] = {"optim/learning_rate": self._setup.schedule(taken)}
        if "grad_norm" in found:  # finite
            line["optim/grad_norm"] = found.pop("grad_norm")
        line |= clock.metrics(self._tokens_per_step)
        line |= {f"train/{name}": value for name, value in found.items()}
        if session.is_eval_step(step):
            line |= self._held_out(state)
        session.log(step, line, shown=self._shown)
        session.checkpoint(step, state)
        return state

    def save(self, state: ModelState) -> None:
        """Saves the model."""
        save_trained(
            self.directory,
            self._setup.network,
            self._config,
            self._tokenization,
            state.params,
        )

    def report(self) -> None:
        """Writes the report of the run, after the last checkpoint."""
        self._session.report()

    def _held_out(self, state: ModelState) -> dict[str, float]:
        return self._evaluate(self._setup.network.whole(state.params))

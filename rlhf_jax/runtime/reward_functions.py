"""Rewards that are Python functions, called in processes of their own.

A function of anybody's may raise, hang, print, or take the interpreter down with it; in
a worker process it can do none of that to the run. Workers run
`rlhf_jax.runtime.reward_worker` as a script rather than under `multiprocessing`: fork is
unsafe in a process that holds jax, and spawn would import the main module of the run,
and jax with it, in every worker.
"""

import collections
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from rlhf_jax.runtime import reward_worker
from rlhf_jax.runtime.reward_worker import (
    Job,
    Outcome,
    RewardFunctionError,
    load_reward_function,
)
from rlhf_jax.runtime.row_files import shown

__all__ = [
    "OnFailure",
    "RewardFunctionError",
    "RewardScores",
    "RewardWorkers",
    "load_reward_function",
]

OnFailure = Literal["stop"] | float

_START_LIMIT = 120.0  # seconds; importing a large library on a busy machine takes some


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RewardScores:
    """What F reward functions say of B responses."""

    scores: np.ndarray  # [B] float32, Σ_f weight_f · by_function[f]
    by_function: np.ndarray  # [F, B] float32
    failures: np.ndarray  # [F] int32, rows that got the stated value instead


class RewardWorkers:
    """Worker processes that score batches with reward functions.

        with RewardWorkers(["my_rewards.py:exact_answer"]) as rewards:
            scores = rewards.score(prompts, responses, columns).scores  # [B]

    Each function is called as `function(prompts, responses, columns)`, three lists of
    equal length (`columns` is a dictionary of them), and returns that many numbers, as a
    list, tuple or array. True and False count as 1 and 0. None, text, NaN, infinity and
    anything else that is no finite float32 is a failure; so is an exception, the wrong
    length, a call that takes longer than the time limit, and the end of the process.

    A function must score each row by itself, because it sees only part of a batch: the
    batch is divided among the workers, and where a call fails as a whole, its rows are
    scored again one at a time to find the one at fault. Only the rows that fail alone
    are failures. A worker that hangs is killed, with every process it started, and its
    successor imports the files again.

    Workers leave the accelerators alone (`JAX_PLATFORMS=cpu`), get no Ctrl-C and end
    with this process, however it ends. What they print goes where this process prints.

    Entering the block starts the workers and has every function imported and checked:
    enter it before any expensive work.

    Args:
        specs: F functions, `path/to/file.py:function` or `package.module:function`;
            modules are looked for where this process looks, and in the working
            directory.
        weights: of the functions in the sum; as it is, 1 each.
        processes: number of workers.
        time_limit: seconds for a call, on a worker's part of a batch or on one row.
        on_failure: "stop", or the score of a row that fails.

    Raises:
        RewardFunctionError: on entering, where a function cannot be used.
        ValueError: where an option is wrong.
    """

    def __init__(
        self,
        specs: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        processes: int = 4,
        time_limit: float = 5.0,
        on_failure: OnFailure = "stop",
    ):
        self.specs = list(specs)
        self.weights = [1.0] * len(self.specs) if weights is None else list(weights)
        self.processes = processes
        self.time_limit = time_limit
        self.on_failure: OnFailure = on_failure
        self._check_options()
        self._workers: list[_Worker] = []

    def __enter__(self) -> "RewardWorkers":
        try:
            for _ in range(self.processes):
                self._workers.append(_Worker(self.specs))
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self._end_workers()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_workers()

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence],
    ) -> RewardScores:
        """Scores of B responses, in their order.

        Args:
            prompts: B texts.
            responses: B texts.
            columns: the other columns of the rows, B values each.

        Raises:
            RewardFunctionError: with `on_failure="stop"`, where a row fails: one line
                with the function, the row (from 0) and the beginning of its response.
            ValueError: where the lengths differ, or outside the `with` block.
        """
        if not self._workers:
            raise ValueError("RewardWorkers.score: call it inside the `with` block")
        lengths = {name: len(column) for name, column in columns.items()}
        lengths |= {"responses": len(responses), "prompts": len(prompts)}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"one row each, please, and not {counts}")
        batch = _Batch(prompts, responses, columns)
        found = [self._score_one(index, batch) for index in range(len(self.specs))]
        by_function = np.array([scores for scores, _ in found], np.float64)
        return RewardScores(
            scores=(np.array(self.weights) @ by_function).astype(np.float32),
            by_function=by_function.astype(np.float32),
            failures=np.array([failures for _, failures in found], np.int32),
        )

"""Python reward functions, called in worker processes.

A user's function may raise, hang, fork, fill memory or crash the interpreter; in a
worker process these mistakes do not affect the run. It is no sandbox: a function may do
whatever the user may do.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal

import numpy as np

from rlhf_jax.config.reward_limits import LARGEST_MEMORY, LARGEST_REWARD, LONGEST_CALL
from rlhf_jax.config.reward_sources import function_name
from rlhf_jax.files.printable import shown
from rlhf_jax.rewards.frames import pack
from rlhf_jax.rewards.loading import (
    RewardError,
    RewardFunctionError,
    load_reward_function,
)
from rlhf_jax.rewards.process import Job, RewardProcess, run_jobs
from rlhf_jax.rewards.worker import Outcome

__all__ = [
    "OnFailure",
    "RewardError",
    "RewardFunctionError",
    "RewardScores",
    "RewardWorkers",
    "function_name",
    "load_reward_function",
]

OnFailure = Literal["stop"] | float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RewardScores:
    """The scores of B responses by F reward functions."""

    scores: np.ndarray  # [B] float32, Σ_f weight_f · by_function[f]
    by_function: np.ndarray  # [F, B] float32
    failures: np.ndarray  # [F] int32, rows scored with `on_failure`
    complaints: tuple[str, ...]  # one line per failure


class RewardWorkers:
    """Worker processes that score batches with reward functions.

        with RewardWorkers(["my_rewards.py:exact_answer"]) as rewards:
            scores = rewards.score(prompts, responses, columns).scores  # [B]

    Each function is called as `function(prompts, responses, columns)`, with lists of
    equal length (`columns` is a dictionary of them), and returns that many numbers in a
    list, a tuple or an array. True and False count as 1 and 0. None, text, NaN,
    infinity and numbers beyond ±`LARGEST_REWARD` are failures; so are exceptions, a
    wrong length, timeouts and crashes.

    A function must score each row independently, because it sees only part of a batch:
    the batch is split among the workers, and if a call fails as a whole, its rows are
    scored again one at a time to find the cause. Only rows that fail on their own are
    failures. A worker that hangs is killed, and its replacement imports the files
    again.

    Workers do not use accelerators (`JAX_PLATFORMS=cpu`), ignore SIGINT, SIGTERM and
    SIGHUP, and exit with this process, however it exits. They print to this process's
    output. What a function started is killed with its worker: on Linux every process
    below it, even in a session of its own, unless it runs as another user; elsewhere
    only its process group. Only memory on disk (`/dev/shm`, files) stays.

    A call that forks fails if the child returns from it within 0.2 s, since nobody
    could tell its answer from the right one; a child that returns later just exits.
    Values of columns arrive as the row file holds them. Other values than those of
    JSON and parquet files are refused.

    Entering the block starts the workers and imports and checks every function: enter
    it before any expensive work.

    Args:
        specs: F functions, `path/to/file.py:function` or `package.module:function`;
            modules are searched on this process's path and in the working directory.
        weights: of the functions in the sum; default 1 each.
        processes: number of workers.
        time_limit: seconds per call, for a worker's part of a batch or one row.
        memory_limit: GiB of address space per process, with libraries and the stacks
            of threads, which NumPy needs about 1 GiB of; None: no limit.
        on_failure: "stop", or the score of a row that fails.

    Raises:
        RewardFunctionError: on entering, if a function cannot be used.
        ValueError: for an invalid option.
    """

    def __init__(
        self,
        specs: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        processes: int = 2,
        time_limit: float = 5.0,
        memory_limit: float | None = None,
        on_failure: OnFailure = "stop",
    ):
        self.specs = list(specs)
        self.weights = [1.0] * len(self.specs) if weights is None else list(weights)
        self.processes = processes
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self.on_failure: OnFailure = on_failure
        self._check_options()
        self._workers: list[RewardProcess] = []

    def __enter__(self) -> "RewardWorkers":
        try:
            for _ in range(self.processes):
                self._workers.append(RewardProcess(self.specs, self.memory_limit))
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
            RewardFunctionError: with `on_failure="stop"`, if a row fails: one line with
                the function, the row (from 0) and the start of its response.
            RewardError: if a weighted sum is beyond ±`LARGEST_REWARD`.
            ValueError: if the lengths differ, a column holds a value that is not of a
                row file, or outside the `with` block.
        """
        if not self._workers:
            raise ValueError("RewardWorkers.score: call it inside the `with` block")
        named = [("prompts", prompts), ("responses", responses), *columns.items()]
        if len({len(column) for _, column in named}) > 1:
            counts = ", ".join(f"{len(column)} {name}" for name, column in named)
            raise ValueError(f"{counts} do not match; give one of each per row")
        batch = _Batch(prompts, responses, columns)
        complaints: list[str] = []
        found, failures = [], []
        for function in range(len(self.specs)):
            before = len(complaints)
            found.append(self._score_one(function, batch, complaints))
            failures.append(len(complaints) - before)
        by_function = np.array(found, np.float64)
        scores = np.array(self.weights) @ by_function
        self._check_sums(scores, by_function, responses)
        return RewardScores(
            scores=scores.astype(np.float32),
            by_function=by_function.astype(np.float32),
            failures=np.array(failures, np.int32),
            complaints=tuple(complaints),
        )

    def _check_sums(
        self, scores: np.ndarray, by_function: np.ndarray, responses: Sequence[str]
    ) -> None:
        too_large = np.abs(scores) > LARGEST_REWARD
        if not too_large.any():
            return
        row = int(too_large.argmax())
        terms = [
            f"{weight:g} · {score:g} of {spec}"
            for weight, score, spec in zip(
                self.weights, by_function[:, row], self.specs, strict=True
            )
        ]
        raise RewardError(
            f"the reward of row {row} (response {shown(responses[row])}) is "
            f"{scores[row]:g} = {' + '.join(terms)}; rewards go from "
            f"{-LARGEST_REWARD:g} to {LARGEST_REWARD:g}: scale the function or "
            "--reward-weights down"
        )

    def _score_one(
        self, function: int, batch: "_Batch", complaints: list[str]
    ) -> list[float]:
        """Every row's score by one function; appends a line per failure."""
        parts = batch.parts(self.processes)
        outcomes = self._run([batch.job(function, part) for part in parts])
        scores = []
        for part, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, str):
                outcome = self._score_again(function, batch, part, outcome)
            # With "stop", the rows after a failure were not scored again.
            for row, score in zip(part, outcome, strict=False):
                if isinstance(score, str):
                    response = shown(batch.responses[row])
                    line = (
                        f"{self.specs[function]}, row {row} (response {response}): "
                        f"{score}"
                    )
                    if self.on_failure == "stop":
                        raise RewardFunctionError(line)
                    complaints.append(line)
                    score = self.on_failure
                scores.append(score)
        return scores

    def _score_again(
        self, function: int, batch: "_Batch", part: range, complaint: str
    ) -> list[float | str]:
        """Scores one row at a time after the whole call failed; until a row that
        stops."""
        stopping = self.on_failure == "stop"
        jobs = [batch.job(function, range(row, row + 1)) for row in part]
        outcomes = self._run(jobs, until_failure=stopping)
        found = [
            outcome if isinstance(outcome, str) else outcome[0] for outcome in outcomes
        ]
        if stopping and not any(isinstance(score, str) for score in found):
            raise RewardFunctionError(
                f"{self.specs[function]}, rows {part[0]} to {part[-1]} in one call: "
                f"{complaint}; each of these rows is scored correctly on its own"
            )
        return found

    def _run(self, jobs: list[Job], *, until_failure: bool = False) -> list[Outcome]:
        return run_jobs(
            self._workers,
            jobs,
            time_limit=self.time_limit,
            until_failure=until_failure,
        )

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _check_options(self) -> None:
        if not self.specs:
            raise ValueError("no reward function is named: give file.py:function")
        if len(self.weights) != len(self.specs):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.specs)} reward functions: "
                "give one each"
            )
        if not all(abs(weight) <= LARGEST_REWARD for weight in self.weights):
            raise ValueError(
                f"weights={self.weights}: give numbers from {-LARGEST_REWARD:g} to "
                f"{LARGEST_REWARD:g}"
            )
        if self.processes < 1:
            raise ValueError(f"processes={self.processes}: give at least 1")
        if not 0 < self.time_limit <= LONGEST_CALL:
            raise ValueError(
                f"time_limit={self.time_limit}: give seconds above 0, at most "
                f"{LONGEST_CALL:g}"
            )
        limit = self.memory_limit
        if limit is not None and not 0 < limit <= LARGEST_MEMORY:
            raise ValueError(
                f"memory_limit={limit}: give GiB above 0, at most {LARGEST_MEMORY:g}"
            )
        value = self.on_failure
        if value != "stop" and (
            isinstance(value, str) or not abs(value) <= LARGEST_REWARD
        ):
            raise ValueError(
                f'on_failure={shown(value)}: give "stop" or the score of failed rows, '
                f"from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
            )


@dataclasses.dataclass(frozen=True)
class _Batch:
    prompts: Sequence[str]
    responses: Sequence[str]
    columns: Mapping[str, Sequence]

    def parts(self, count: int) -> list[range]:
        """The rows in at most `count` consecutive nonempty parts."""
        total = len(self.responses)
        bounds = [total * part // count for part in range(count + 1)]
        pairs = itertools.pairwise(bounds)
        return [range(start, stop) for start, stop in pairs if start < stop]

    def job(self, function: int, rows: range) -> Job:
        part = slice(rows.start, rows.stop)
        columns = {}
        for name, column in self.columns.items():
            try:
                columns[name] = [pack(value) for value in column[part]]
            except ValueError as error:
                raise ValueError(
                    f"column {shown(name)}, rows {rows.start} to {rows.stop - 1}: "
                    f"{error} cannot be given to a reward function; leave the column "
                    "out of --reward-columns"
                ) from None
        return Job(
            function,
            list(self.prompts[part]),
            list(self.responses[part]),
            {"dict": list(map(list, columns.items()))},
        )

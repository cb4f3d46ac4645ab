"""Processes that run reward functions, seen from the side that gives them work.

They run `reward_worker` as a script rather than under `multiprocessing`: fork is unsafe
in a process that holds jax, and spawn would import the main module of the run, and jax
with it, in every one of them.
"""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait

from rlhf_jax.rewards import worker as reward_worker
from rlhf_jax.rewards.worker import Job, Outcome, RewardFunctionError, Setup

_START_LIMIT = 120.0  # seconds; on a busy machine a large library takes many


class RewardProcess:
    """A process that has imported some reward functions, one job at a time.

    It starts at once; `wait_until_ready` must follow. Once it has ended, by itself or
    by `kill`, the next `begin` starts another in its place.

    Args:
        specs: the functions, see `load_reward_function`; a job names one by its index.
    """

    def __init__(self, specs: Sequence[str]):
        self._specs = list(specs)
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        handle = theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                # -P: the modules beside the script must not pass for libraries.
                [sys.executable, "-P", reward_worker.__file__, str(handle)],
                stdin=subprocess.DEVNULL,
                pass_fds=[handle],
                start_new_session=True,  # no Ctrl-C, and its children end with it
                # The accelerators' memory belongs to the run.
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        self._send((self._specs, [*sys.path, os.getcwd()]))

    def wait_until_ready(self) -> None:
        """Returns once the functions are imported and checked.

        Raises:
            RewardFunctionError: where one of them cannot be used.
        """
        names = ", ".join(self._specs)
        if not self.connection.poll(_START_LIMIT):
            self.kill()
            raise RewardFunctionError(
                f"{names}: importing took longer than {_START_LIMIT:g} s"
            )
        try:
            complaint = self.connection.recv()
        except (EOFError, OSError):
            complaint = f"{names}: importing ended the process: {self._ending()}"
        if complaint is not None:
            raise RewardFunctionError(complaint)

    def begin(self, job: Job) -> None:
        """Sends a job; `connection` becomes readable when there is an answer."""
        if self._process.poll() is not None:
            self.connection.close()
            self._start()
            self.wait_until_ready()
        self._send(job)

    def answer(self) -> Outcome:
        """The answer to the job; waits for it."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return f"ended its process: {self._ending()}"

    def kill(self) -> None:
        """Ends the process and what it started."""
        if self._process.returncode is None:  # else the number may be another's by now
            # macOS refuses where all that is left of a group is its ended leader.
            with contextlib.suppress(PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()

    def _send(self, message: Setup | Job) -> None:
        # If the process has just ended, reading its answer will show it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def _ending(self) -> str:
        """How the process ended, after the same end for what it started."""
        self.kill()
        code = self._process.returncode
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def run_jobs(
    processes: Sequence[RewardProcess],
    jobs: Sequence[Job],
    *,
    time_limit: float,
    until_failure: bool = False,
) -> list[Outcome]:
    """What becomes of the jobs, in their order.

    Args:
        processes: ready for work; one that exceeds the limit is killed.
        jobs: each goes to the next process that is free.
        time_limit: seconds for one job.
        until_failure: begin no job once a row or a job has failed. Jobs are begun in
            order, so that the list may be shorter then but has no gaps before its end.

    Raises:
        RewardFunctionError: where a process had to be replaced and could not be.
    """
    outcomes: dict[int, Outcome] = {}
    waiting = collections.deque(enumerate(jobs))
    idle = list(processes)
    running: list[tuple[RewardProcess, int, float]] = []  # with job and deadline
    try:
        while waiting or running:
            while waiting and idle:
                (index, job), process = waiting.popleft(), idle.pop()
                process.begin(job)
                running.append((process, index, time.monotonic() + time_limit))
            connections = [process.connection for process, _, _ in running]
            first_deadline = min(deadline for _, _, deadline in running)
            ready = wait(connections, max(0.0, first_deadline - time.monotonic()))
            now = time.monotonic()
            for process, index, deadline in running[:]:
                if process.connection in ready:
                    outcomes[index] = process.answer()
                elif now >= deadline:
                    process.kill()
                    outcomes[index] = f"took longer than {time_limit:g} s"
                else:
                    continue
                running.remove((process, index, deadline))
                idle.append(process)
                if until_failure and _has_failed(outcomes[index]):
                    waiting.clear()
    finally:
        for process, _, _ in running:  # an interruption: nobody will read their answers
            process.kill()
    return [outcomes[index] for index in sorted(outcomes)]


def _has_failed(outcome: Outcome) -> bool:
    return isinstance(outcome, str) or any(isinstance(row, str) for row in outcome)

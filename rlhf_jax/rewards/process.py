"""Processes that run reward functions: the parent's side.

They run `worker.py` as a script rather than with `multiprocessing`: fork is unsafe
in a process that uses jax, and spawn would import the run's main module, and jax with
it, in every worker.
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

_START_LIMIT = 120.0  # seconds; large imports are slow on a busy machine


class RewardProcess:
    """A process that runs reward functions, one job at a time.

    It starts immediately; call `wait_until_ready` next. After it exits or is killed,
    the next `begin` starts a replacement.

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
                # -P: modules next to the script must not shadow libraries.
                [sys.executable, "-P", reward_worker.__file__, str(handle)],
                stdin=subprocess.DEVNULL,
                pass_fds=[handle],
                start_new_session=True,  # no Ctrl-C; its children are killed with it
                # Accelerator memory is for the run.
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        self._send((self._specs, [*sys.path, os.getcwd()]))

    def wait_until_ready(self) -> None:
        """Returns once the functions are imported and checked.

        Raises:
            RewardFunctionError: if one of them cannot be used.
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
            complaint = f"{names}: importing crashed the process: {self._ending()}"
        if complaint is not None:
            raise RewardFunctionError(complaint)

    def begin(self, job: Job) -> None:
        """Sends a job; `connection` becomes readable when the result is ready."""
        if self._process.poll() is not None:
            self.connection.close()
            self._start()
            self.wait_until_ready()
        self._send(job)

    def answer(self) -> Outcome:
        """Waits for the result of the job."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return f"crashed its process: {self._ending()}"

    def kill(self) -> None:
        """Kills the process and its children."""
        if self._process.returncode is None:  # otherwise the pid may have been reused
            # macOS raises if only the exited leader of the group is left.
            with contextlib.suppress(PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.connection.close()

    def _send(self, message: Setup | Job) -> None:
        # If the process has just exited, reading its result will show it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def _ending(self) -> str:
        """How the process exited, after killing its children."""
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
    """Runs the jobs and returns their outcomes in order.

    Args:
        processes: ready processes; one that exceeds the limit is killed.
        jobs: each is sent to the next free process.
        time_limit: seconds per job.
        until_failure: start no more jobs once a row or a job has failed. Jobs are
            started in order, so the list may then be shorter but has no gaps.

    Raises:
        RewardFunctionError: if a replacement process cannot be started.
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
        for process, _, _ in running:  # interrupted: nobody will read their results
            process.kill()
    return [outcomes[index] for index in sorted(outcomes)]


def _has_failed(outcome: Outcome) -> bool:
    return isinstance(outcome, str) or any(isinstance(row, str) for row in outcome)

"""Processes that run reward functions: the parent's side.

They run `supervisor.py` as a script rather than with `multiprocessing`: fork is unsafe
in a process that uses jax, and spawn would import the run's main module, and jax with
it, in every worker.
"""

import collections
import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.config.reward_limits import LARGEST_REWARD
from rlhf_jax.files.printable import printable
from rlhf_jax.rewards import supervisor
from rlhf_jax.rewards.frames import FrameError, take_frame, to_frame
from rlhf_jax.rewards.loading import RewardFunctionError
from rlhf_jax.rewards.worker import DISCONNECTED, LONGEST_TEXT, Outcome

_START_LIMIT = 120.0  # seconds; large imports are slow on a busy machine
_END_LIMIT = 5.0  # seconds for a supervisor to kill everything below it and exit


@dataclasses.dataclass(frozen=True)
class Job:
    """A call of a reward function."""

    function: int  # its index
    prompts: list[str]
    responses: list[str]
    columns: Any  # packed


class RewardProcess:
    """A process that runs reward functions, one job at a time.

    It starts immediately; call `wait_until_ready` next. After it exits or is killed,
    the next `begin` starts a replacement.

    Args:
        specs: the functions, see `load_reward_function`; a job names one by its index.
        memory_limit: GiB of its address space; None: no limit.
    """

    def __init__(self, specs: Sequence[str], memory_limit: float | None = None):
        self._specs = list(specs)
        self._memory_limit = memory_limit
        self._start()

    def _start(self) -> None:
        self.socket, theirs = socket.socketpair()
        self._lifeline, its_lifeline = socket.socketpair()
        handles = [theirs.fileno(), its_lifeline.fileno()]
        with theirs, its_lifeline:
            self._process = subprocess.Popen(
                # -P: modules next to the script must not shadow libraries.
                [
                    *(sys.executable, "-P", supervisor.__file__),
                    *map(str, (*handles, os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                start_new_session=True,  # no Ctrl-C
                # Accelerator memory is for the run.
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        self.socket.setblocking(False)
        self._received = bytearray()
        self._worker: int | None = None  # its process id
        self._job = 0  # number of the current one
        limit = self._memory_limit
        self._send(
            {
                "specs": self._specs,
                "path": [*sys.path, os.getcwd()],
                "memory": limit if limit is None else int(limit * 2**30),
            },
            rows=0,
        )

    def wait_until_ready(self) -> None:
        """Returns once the functions are imported and checked.

        Raises:
            RewardFunctionError: if one of them cannot be used.
        """
        names = ", ".join(self._specs)
        found = None
        deadline = time.monotonic() + _START_LIMIT
        while found is None:
            _wait([self], deadline)
            found = self.advance()
            if found is None and time.monotonic() >= deadline:
                self.kill()
                found = f"took longer than {_START_LIMIT:g} s"
        if isinstance(found, str):
            if not found.startswith((*self._specs, "reward-memory-limit")):
                found = f"{names}: importing {found}"
            raise RewardFunctionError(found)

    def begin(self, job: Job) -> None:
        """Sends a job; ask for its result with `advance`."""
        if self._process.poll() is not None or self._has_unread():
            self.kill()
            self._start()
            self.wait_until_ready()
        self._send(vars(job), rows=len(job.responses))

    def _has_unread(self) -> bool:
        """Whether something came after the last result: only garbage can."""
        with contextlib.suppress(BlockingIOError):
            self._received += self.socket.recv(1)
        return bool(self._received)

    def _send(self, message: Mapping[str, Any], *, rows: int) -> None:
        self._job += 1
        self._rows = rows
        self._unsent = memoryview(to_frame({"job": self._job, **message}))

    @property
    def has_unsent(self) -> bool:
        """Whether a part of the job is still here."""
        return bool(self._unsent)

    def advance(self) -> Outcome | None:
        """The result of the job, or None if it is not there yet; never waits.

        Sends what the process takes and receives what is there.
        """
        try:
            self._exchange()
            while (message := self._next_message()) is not None:
                found = self._outcome_in(message)
                if found is not None:
                    return self._with_hint(found)
        except FrameError as error:
            self.kill()
            return (
                f"wrote to the socket of its process ({error}); a function must not "
                "write to descriptors that it did not open"
            )
        except OSError:
            return self._with_hint(self._ending())
        return None

    def _exchange(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        with contextlib.suppress(BlockingIOError):
            data = self.socket.recv(1 << 20)
            if not data:
                raise ConnectionResetError
            self._received += data

    def _next_message(self) -> dict[str, Any] | None:
        # JSON needs up to 12 bytes per character.
        longest = (self._rows + 1) * (12 * LONGEST_TEXT + 200)
        return take_frame(self._received, longest=longest)

    def _outcome_in(self, message: dict[str, Any]) -> Outcome | None:
        """The result in a message; None if it is not from this worker and job.

        Raises:
            FrameError: if it cannot be a result.
        """
        if self._worker is None:  # the first message is sent before any user code runs
            self._worker = message.get("pid")
            return None
        if message.get("pid") != self._worker or message.get("job") != self._job:
            return None
        found = message.get("outcome")
        if isinstance(found, str):
            return printable(found)
        if not isinstance(found, list) or len(found) != self._rows:
            raise FrameError("a message without a result per row")
        return [_checked(row) for row in found]

    def _with_hint(self, found: Outcome) -> Outcome:
        """Names the memory limit where it may be the cause."""
        limit = self._memory_limit
        if limit is None or isinstance(found, list):
            return found
        if "MemoryError" in found or found.startswith("crashed"):
            return f"{found}; --reward-memory-limit is {limit:g} GiB: try more"
        return found

    def kill(self) -> None:
        """Kills the process and everything that it started."""
        if self._process.returncode is None:
            # Not only `close`: a process forked from this one may hold a copy.
            with contextlib.suppress(OSError):
                self._lifeline.shutdown(socket.SHUT_RDWR)
            try:
                self._process.wait(_END_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._lifeline.close()
        self.socket.close()

    def _ending(self) -> str:
        """How the process exited, after killing what it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_LIMIT)
        code = self._process.returncode
        self.kill()
        if code is None or code == DISCONNECTED:
            return "closed its connection to the run"
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"crashed its process: {how}"


def _checked(row: Any) -> float | str:
    """The score or error of a row that a worker sent."""
    if isinstance(row, str):
        return printable(row)
    if type(row) is not float:
        raise FrameError("a message with a row that is no score")
    if abs(row) <= LARGEST_REWARD:
        return row
    if abs(row) < float("inf"):
        return (
            f"returned {row:g}; scores go from {-LARGEST_REWARD:g} to "
            f"{LARGEST_REWARD:g}: scale them in the function"
        )
    return f"returned {row}, which is not finite"


def _wait(processes: Sequence[RewardProcess], deadline: float) -> None:
    """Until a process can go on, at most until a deadline of `time.monotonic`."""
    poll = select.poll()  # `select` cannot take descriptors above 1023
    for process in processes:
        events = select.POLLIN | (select.POLLOUT if process.has_unsent else 0)
        poll.register(process.socket, events)
    poll.poll(1000 * max(0.0, deadline - time.monotonic()))


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
            _wait(
                [process for process, _, _ in running],
                min(deadline for _, _, deadline in running),
            )
            for process, index, deadline in running[:]:
                found = process.advance()
                if found is None and time.monotonic() >= deadline:
                    process.kill()
                    found = f"took longer than {time_limit:g} s"
                if found is None:
                    continue
                outcomes[index] = found
                running.remove((process, index, deadline))
                idle.append(process)
                if until_failure and _has_failed(found):
                    waiting.clear()
    finally:
        for process, _, _ in running:  # interrupted: nobody will read their results
            process.kill()
    return [outcomes[index] for index in sorted(outcomes)]


def _has_failed(outcome: Outcome) -> bool:
    return isinstance(outcome, str) or any(isinstance(row, str) for row in outcome)

"""A worker process: loads reward functions and calls them.

`supervisor.py` starts it. It uses only the standard library: jax would take a second
to load in a process that may be replaced at any time.

It sends its process id, receives the names of the functions, and then one job after
the other. Each message carries the number of its job, each reply also the process id.
"""

import contextlib
import math
import numbers
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rlhf_jax.rewards.frames import LONGEST_FRAME, take_frame, to_frame, unpack
from rlhf_jax.rewards.loading import (
    RewardFunction,
    RewardFunctionError,
    described,
    load_reward_function,
)

Outcome = list[float | str] | str
"""The score or error of each row, or the error of the whole call."""

LONGEST_TEXT = 400  # characters of an error
DISCONNECTED = 74  # exit code

_FORK_PATIENCE = 200  # milliseconds after a call for its forked children to return


def outcome(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: dict[str, list],
) -> Outcome:
    """Calls the function; converts any result or failure to plain data."""
    caller = os.getpid()
    try:
        result = function(prompts, responses, columns)
        if os.getpid() != caller:
            return ""  # of a forked child; nobody will see it
        rows = _plain(result)
        if not isinstance(rows, list | tuple):
            return f"returned {_shown(result)} instead of a list of numbers"
        rows = list(rows)  # a class of the user's may lie about its length
        if len(rows) != len(responses):
            return f"returned {len(rows)} numbers for {len(responses)} responses"
        return [_score(row) for row in rows]
    except BaseException as error:  # includes SystemExit: the worker must continue
        if os.getpid() != caller:
            os._exit(1)
        return described(error)[:LONGEST_TEXT]


def _plain(value: Any) -> Any:
    """Converts arrays to lists, and their elements to Python numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _score(row: Any) -> float | str:
    value = _plain(row)
    if not isinstance(value, numbers.Real):
        return f"returned {_shown(value)}, which is not a number"
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Forks:
    """Notices children that return from a call as if they were the worker."""

    def __init__(self):
        self._worker = os.getpid()
        self._pipe: list[int] = []
        os.register_at_fork(before=self._open)

    def _open(self) -> None:
        """Before the first fork of a call: a pipe that all its children inherit."""
        if not self._pipe:
            self._pipe += os.pipe()

    def watch(self, call: Callable[[], Outcome]) -> Outcome:
        """The result of `call`; in a forked child it does not return."""
        self._pipe.clear()
        result = call()
        if not self._pipe:
            return result
        readable, mine = self._pipe
        if os.getpid() != self._worker:
            os.write(mine, b"1")
            os._exit(1)
        os.close(mine)
        # Ready when a child writes, or when all have ended or run another program.
        poll = select.poll()
        poll.register(readable, select.POLLIN)
        has_returned = bool(poll.poll(_FORK_PATIENCE) and os.read(readable, 1))
        os.close(readable)
        if has_returned:
            return "forked, and the child returned too; end it with os._exit"
        return result


def _ignore_requests() -> None:
    """Ignores SIGINT, SIGTERM and SIGHUP, but not in the worker's own children.

    A scheduler may send them to every process of the run, which ends its step.
    """

    def set_all(handler: Callable | int) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, handler)

    def ignore() -> None:
        set_all(lambda *_: None)  # not SIG_IGN, which other programs would inherit

    ignore()
    os.register_at_fork(before=lambda: set_all(signal.SIG_DFL), after_in_parent=ignore)


class _Connection:
    """The worker's end of the socket."""

    def __init__(self, handle: int):
        self._socket = socket.socket(fileno=handle)
        self._received = bytearray()

    def receive(self) -> dict[str, Any]:
        """The next message; exits if the run is gone."""
        while (message := take_frame(self._received, longest=LONGEST_FRAME)) is None:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                os._exit(DISCONNECTED)
            self._received += data
        return message

    def send(self, job: int, result: Outcome) -> None:
        """Sends the result of a job."""
        reply = {"pid": os.getpid(), "job": job, "outcome": result}
        try:
            self._socket.sendall(to_frame(reply))
        except OSError:  # a reward function has closed it, or the run is gone
            os._exit(DISCONNECTED)


def serve(handle: int) -> NoReturn:
    """Serves the socket of this file descriptor, until it closes."""
    _ignore_requests()
    connection, forks = _Connection(handle), _Forks()
    connection.send(0, [])
    setup = connection.receive()
    functions = []
    connection.send(setup["job"], forks.watch(lambda: _load(setup, functions)))
    while True:
        job = connection.receive()
        batch = (job["prompts"], job["responses"], unpack(job["columns"]))
        call = functions[job["function"]]
        result = forks.watch(lambda call=call, batch=batch: outcome(call, *batch))
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # what is printed must not wait for later calls
        signal.setitimer(signal.ITIMER_REAL, 0)  # must not go off in the next call
        connection.send(job["job"], result)


def _load(setup: dict[str, Any], functions: list[RewardFunction]) -> Outcome:
    """Appends the functions; returns [] or what is wrong."""
    sys.path[:] = setup["path"]
    try:
        _limit_memory(setup["memory"])
        functions += map(load_reward_function, setup["specs"])
    except RewardFunctionError as error:
        return str(error)[:LONGEST_TEXT]
    return []


def _limit_memory(size: int | None) -> None:
    """Limits the address space to `size` bytes."""
    if size is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        size = min(size, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):
        raise RewardFunctionError(
            "reward-memory-limit: this system has no such limit; leave it out"
        ) from None

"""Stops a run between steps without losing the last one."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

import jax
import numpy as np

_NOTICE = b"\nStopping after this step; only a second Ctrl-C stops immediately.\n"


RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Interrupted(SystemExit):
    """The run was stopped on request and can be resumed.

    The exit code is 75; the message says how to resume.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = RESUMABLE


class Interruptible:
    """Turns Ctrl-C (SIGINT), SIGTERM and SIGHUP into a request to stop between steps.

        with Interruptible() as interrupt:
            for step in …:
                …
                if interrupt.requested:
                    break  # save a checkpoint, print how to resume

    Only a second SIGINT raises KeyboardInterrupt immediately. Schedulers repeat SIGTERM
    and send it to each process of a job; further ones do not break the step or its
    checkpoint. SIGHUP is left alone where it is ignored, as under `nohup`; otherwise
    the terminal is gone, and output to it is discarded.

    Leaving the block restores the previous handlers. Python delivers signals only to
    the main thread, so the block has no effect in other threads.

    Attributes:
        requested: whether this process was asked to stop.
    """

    def __init__(self):
        self.requested = False
        self._interrupts = 0
        self._previous = {}
        self._terminals: list[int] = []

    def requested_anywhere(self) -> bool:
        """Whether any process was asked to stop; the same result on all of them.

        With several processes, call this between steps in each of them: if one stops
        alone, the others wait forever.
        """
        if jax.process_count() == 1:
            return self.requested
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(self.requested)).any())

    def __enter__(self) -> "Interruptible":
        if threading.current_thread() is threading.main_thread():
            self._terminals = [handle for handle in (1, 2) if os.isatty(handle)]
            self._previous = {
                number: signal.signal(number, self._handle)
                for number in (signal.SIGINT, *_ending_signals())
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _restore(self._previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= 2:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            # Not `print`: the signal may have interrupted one.
            os.write(2, _NOTICE)
        self.requested = True
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for handle in self._terminals:
                os.dup2(nowhere, handle)
            os.close(nowhere)


def _ending_signals() -> list[int]:
    """SIGTERM, and SIGHUP where it is not ignored."""
    hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, *[signal.SIGHUP] * hangup]


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        # None: a handler that was not installed from Python.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def exits_by_signal() -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP raise SystemExit with 128 + their number.

    Temporary files are then removed and processes ended. The default, an immediate end,
    does neither, and does not even act on the first process of a container. A second
    signal acts as before the block.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        _restore(previous)
        raise SystemExit(128 + number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in _ending_signals():
            previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        _restore(previous)

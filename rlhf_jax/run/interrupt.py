"""Stops a run between steps without losing the last one."""

import os
import signal
import threading
from types import FrameType, TracebackType

import jax
import numpy as np

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTICE = b"\nStopping after this step; interrupt again to stop immediately.\n"


class Interruptible:
    """Turns the first Ctrl-C or SIGTERM into a request to stop between two steps.

        with Interruptible() as interrupt:
            for step in …:
                …
                if interrupt.requested:
                    break  # save a checkpoint, print how to resume

    A second signal raises KeyboardInterrupt immediately. Leaving the block restores the
    previous handlers. Python delivers signals only to the main thread, so the block has
    no effect in other threads.

    Attributes:
        requested: whether this process was asked to stop.
    """

    def __init__(self):
        self.requested = False
        self._previous = {}

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
            self._previous = {
                number: signal.signal(number, self._handle) for number in _SIGNALS
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not `print`: the signal may have interrupted one.
        os.write(2, _NOTICE)

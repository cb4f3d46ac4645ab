"""Silences what libraries print when a checkpoint cannot be written."""

import functools
import logging
import sys
from typing import Any


@functools.cache  # once in a process
def quieten_writer() -> None:
    """Leaves the one error that `Checkpointer.wait` raises.

    Orbax logs a traceback for each of its threads as well. TensorStore reports, for
    each array whose write ends after the first failure, that nobody waits for it.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            report(found)

    sys.unraisablehook = report_others

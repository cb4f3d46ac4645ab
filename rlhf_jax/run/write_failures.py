"""Why a checkpoint cannot be written, in one line instead of many."""

import functools
import logging
import os
import re
import sys
from typing import Any

from rlhf_jax.files.printable import one_line


@functools.cache  # once in a process
def quieten_writer() -> None:
    """Leaves the one error that `Checkpointer.wait` raises.

    Orbax logs a traceback for each of its threads as well. TensorStore and asyncio
    report, for each array whose write ends after the first failure, that nobody waits
    for it.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            report(found)

    sys.unraisablehook = report_others


def reason(error: Exception) -> str:
    """The system's reason, such as a full disk, which TensorStore puts last."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)

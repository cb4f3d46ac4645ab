"""Keeps what libraries print, and tracebacks, from controlling the terminal.

Our own output goes through `run.progress`.
"""

import logging
import sys
import traceback
import types
import warnings

from rlhf_jax.files.printable import printable

_format_warning = warnings.formatwarning


def escape_controls() -> None:
    """Escapes control characters in logs, warnings and tracebacks of this process.

    They quote file names and texts of others. Messages that compiled code writes are
    not seen by Python and stay as they are.
    """
    logging.setLogRecordFactory(_LogRecord)
    warnings.formatwarning = _formatted
    sys.excepthook = _print_traceback


class _LogRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return _escaped(super().getMessage())


def _formatted(*arguments, **named) -> str:
    return _escaped(_format_warning(*arguments, **named))


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(_escaped(text), file=sys.stderr, end="")


def _escaped(text: str) -> str:
    return printable(text, keep="\n\t")

"""Progress of a run: a bar in a terminal, plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlhf_jax.files.printable import printable

SECONDS_BETWEEN_LINES = 10.0

_LAYOUT = "\n\t"  # all other control characters are escaped


class StepProgress:
    """Reports the progress of a loop; created by `progress`."""

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` steps are done, and a few metrics.

        Args:
            step: steps done, including those before a resume.
            metrics: short name → number, for example `{"score": 1.2, "KL": 0.3}`.
        """


class _Bar(StepProgress):
    def __init__(self, bar: Progress, total: int, description: str, start: int):
        self._bar = bar
        self._task = bar.add_task(description, total=total, completed=start, metrics="")

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        self._bar.update(self._task, completed=step, metrics=_line(metrics))


class _Lines(StepProgress):
    """One line for the first and last step, and every ten seconds between."""

    def __init__(self, console: Console, total: int, description: str, start: int):
        self._console = console
        self._total = total
        self._description = description
        self._start = start
        self._began = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        elapsed = time.monotonic() - self._began
        is_due = elapsed - self._last_line >= SECONDS_BETWEEN_LINES
        if not is_due and step < self._total:
            return
        self._last_line = elapsed
        remaining = elapsed / max(step - self._start, 1) * (self._total - step)
        text = (
            f"{self._description} {step}/{self._total}, {_clock(elapsed)} elapsed, "
            f"{_clock(remaining)} to go"
        )
        shown = _line(metrics)
        _print(self._console, f"{text}: {shown}" if shown else text)


@contextlib.contextmanager
def progress(
    total: int,
    description: str,
    *,
    start: int = 0,
    quiet: bool = False,
    console: Console | None = None,
) -> Iterator[StepProgress]:
    """Shows the progress of a loop of `total` steps while the block runs.

    Args:
        total: steps of the whole run.
        description: the stage, for example `"ppo"`.
        start: steps already done, if the run is resumed.
        quiet: show nothing; processes other than 0 never do.
        console: output; standard output by default.
    """
    console = console or Console()
    if quiet or jax.process_index() != 0:
        yield StepProgress()
    elif not console.is_terminal:
        yield _Lines(console, total, description, start)
    else:
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", style="cyan", markup=False),
        )
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, total, description, start)


def heading(text: str, *, quiet: bool = False, console: Console | None = None) -> None:
    """Prints a heading, with controls of the terminal escaped."""
    if quiet or jax.process_index() != 0:
        return
    _print(console or Console(), text, style="bold")


def say(text: str) -> None:
    """Prints a text that may come from a file or a model, with controls escaped."""
    print(printable(text, keep=_LAYOUT), flush=True)


def warn(text: str) -> None:
    """Prints one line on stderr, above a progress bar if there is one, even if quiet.

    Processes other than 0 print nothing.
    """
    if jax.process_index() == 0:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


def _print(console: Console, text: str, style: str | None = None) -> None:
    # Plain text: no markup, no highlighting of numbers, no line breaks.
    text = printable(text, keep=_LAYOUT)
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _line(metrics: Mapping[str, Any] | None) -> str:
    values = (metrics or {}).items()
    return "  ".join(f"{printable(name)} {float(value):.4g}" for name, value in values)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

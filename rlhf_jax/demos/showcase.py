"""What the commands share that train everything from nothing: directory and terminal.

These are `quickstart`, `arithmetic` and `overoptimization`, each of several runs in one
directory, which the same command goes on with.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_jax.run.run_directory import write_atomic
from rlhf_jax.run.session import Interrupted


def enter_directory(root: Path, marker: str, options: Mapping[str, Any]) -> None:
    """Enters a new directory, or one that was begun with the same options.

    Args:
        root: the directory.
        marker: name of the file in it that keeps the options.
        options: all that shapes what is kept there; plain values.

    Raises:
        ValueError: where other options began it, or it holds something else. Nothing
            is written then.
    """
    path = root / marker
    text = json.dumps(dict(options)) + "\n"
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        # As a file gives them back: with lists for tuples.
        for name, wanted in json.loads(text).items():
            if found.get(name) != wanted:
                raise ValueError(
                    f"--run-dir {root} was begun with {name.replace('_', '-')}="
                    f"{found.get(name)!r}, not {wanted!r}; give that to go on with "
                    "it, or another --run-dir"
                )
        return
    make_directory(root)
    write_atomic(path, text)


def make_directory(root: Path) -> None:
    """Makes a directory where there is none; one with anything in it is refused."""
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--run-dir {root} is not empty; choose another --run-dir")
    root.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def resumable(command: str) -> Iterator[None]:
    """An interrupted stage says to run the whole again, not the stage."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(
            f"{str(error).split('. Go on')[0]}. Run the same {command} again to go on"
        ) from None


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSONL file."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def print_table(
    rows: Sequence[Mapping[str, str]], *, notes: Sequence[str] = ()
) -> None:
    """Rows of equal keys, the first column to the left; then the notes."""
    table = Table()
    for number, column in enumerate(rows[0]):
        table.add_column(
            column, justify="right" if number else "left", no_wrap=not number
        )
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)

"""Run directories and terminal output shared by the from-scratch commands.

These are `quickstart`, `arithmetic` and `overoptimization`. Each has several runs in
one directory, and rerunning the same command resumes them.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.printable import printable
from rlhf_jax.run.interrupt import Interrupted


def enter_directory(root: Path, marker: str, options: Mapping[str, Any]) -> None:
    """Creates the directory, or reuses one with the same options.

    Args:
        root: the directory.
        marker: name of the file in it that stores the options.
        options: everything that affects the stored results; plain values.

    Raises:
        ValueError: if it has other options or holds something else; nothing is written.
    """
    path = root / marker
    text = json.dumps(dict(options)) + "\n"
    if path.exists():
        found = read_object(path)
        # As loaded from JSON: tuples become lists.
        for name, wanted in json.loads(text).items():
            if found.get(name) != wanted:
                raise ValueError(
                    f"--run-dir {root} was started with {name.replace('_', '-')}="
                    f"{found.get(name)!r}, not {wanted!r}; give that to resume "
                    "it, or another --run-dir"
                )
        return
    make_directory(root)
    write_atomic(path, text)


def make_directory(root: Path) -> None:
    """Creates a directory; raises if it exists and is not empty."""
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--run-dir {root} is not empty; choose another --run-dir")
    root.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def resumable(command: str) -> Iterator[None]:
    """Makes an interrupted stage say to rerun the full command, not the stage."""
    try:
        yield
    except Interrupted as error:
        raise Interrupted(
            f"{str(error).split('. Resume')[0]}. Run the same {command} again to resume"
        ) from None


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSONL file."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def print_table(
    rows: Sequence[Mapping[str, str]], *, notes: Sequence[str] = ()
) -> None:
    """Prints rows with the same keys, the first column left-aligned; then the notes."""
    table = Table()
    for number, column in enumerate(rows[0]):
        table.add_column(
            Text(printable(column)),
            justify="right" if number else "left",
            no_wrap=not number,
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row.values()))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(Text(printable(note)))

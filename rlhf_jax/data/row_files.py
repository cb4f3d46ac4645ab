"""Rows of JSONL and parquet files, each with its location."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.files.bounded_json import parse_json
from rlhf_jax.files.bounded_lines import (
    FREE_CHARACTERS,
    MOST_EXPANSION,
    read_lines,
)
from rlhf_jax.files.printable import one_line, printable, shown
from rlhf_jax.files.regular_file import open_regular

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_SUFFIX = ".txt"
BATCH_ROWS = 1024
"""Rows of a parquet file in memory at a time."""
FREE_ROWS = 1_000_000
"""A parquet file may always have as many; a larger one, one per byte."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file."""

    where: str  # "train.jsonl:3" or "train.parquet, row 3"; both count from 1
    values: dict[str, Any]

    def __getitem__(self, column: str) -> Any:
        """The column's value; raises `ValueError` if the row has no such column."""
        if column not in self.values:
            raise self.error(
                f"no column {shown(column)}; this row has {self.column_names}"
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """The column's value, which must be a string."""
        value = self[column]
        if not isinstance(value, str):
            raise self.error(f"column {shown(column)} is {shown(value)}, not text")
        return value

    @property
    def column_names(self) -> str:
        """The row's columns for an error message."""
        names = ", ".join(map(shown, itertools.islice(self.values, 20)))
        return printable(names, limit=150) or "none"

    def error(self, problem: str) -> ValueError:
        """An exception that names the location of the problem."""
        return ValueError(f"{self.where}: {problem}")


def is_text_file(path: str | os.PathLike[str]) -> bool:
    """Whether the file is plain text rather than rows."""
    return os.fspath(path).lower().endswith(TEXT_SUFFIX)


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yields the rows of a `.jsonl`, `.jsonl.gz` or `.parquet` file, in order.

    Blank lines of a JSONL file are skipped, but included in line numbers.

    Raises:
        ValueError: if the file is missing, empty, corrupt or of another type, a line is
            not JSON, or a row is not an object. One line that names the file and, if
            known, the line.
    """
    file = Path(path)
    name = file.name.lower()
    if name.endswith(".parquet"):
        rows = _read_parquet(file)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        rows = _read_jsonl(file)
    else:
        kinds = ", ".join((*ROW_SUFFIXES, TEXT_SUFFIX))
        raise ValueError(f"{file}: the name must end in one of {kinds}")
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{file}: the file has no rows")


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        values = parse_json(line, where, finite=False)
        if not isinstance(values, dict):
            raise ValueError(
                f"{where}: {shown(values)} is not an object; "
                'each line must be a JSON object such as {"text": "..."}'
            )
        yield Row(where, values)


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open_regular(file) as handle, pyarrow.parquet.ParquetFile(handle) as found:
            _check_parquet(file, found, os.fstat(handle.fileno()).st_size)
            for batch in found.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}, row {number}", values)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 text soon after row {number} ({error.reason})"
        ) from None
    except (pyarrow.ArrowException, OSError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{file}: corrupt parquet file after row {number} ({one_line(error)})"
        ) from None


def _check_parquet(file: Path, found: Any, size: int) -> None:
    """No more rows and bytes than a file of this size can have in earnest."""
    metadata = found.metadata
    rows = metadata.num_rows
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    expanded = sum(group.total_byte_size for group in groups)
    if rows > max(FREE_ROWS, size):
        raise ValueError(f"{file}: {rows:,} rows in {size:,} bytes cannot be data")
    if not 0 <= expanded <= max(FREE_CHARACTERS, MOST_EXPANSION * size):
        raise ValueError(
            f"{file}: {expanded:,} bytes packed into {size:,} cannot be data"
        )

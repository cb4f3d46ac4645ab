"""Rows of JSONL and parquet files, each with its location."""

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_SUFFIX = ".txt"


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
        return ", ".join(shown(name) for name in self.values) or "none"

    def error(self, problem: str) -> ValueError:
        """An exception that names the location of the problem."""
        return ValueError(f"{self.where}: {problem}")


def shown(value: Any) -> str:
    """A value on one line, shortened for error messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    file = _existing_file(path)
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


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yields `(line number from 1, line with its end)` of a text file in UTF-8.

    Raises:
        ValueError: if the file is missing, not UTF-8, or a corrupt gzip file.
    """
    file = _existing_file(path)
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 text somewhere after line {number} ({error.reason})"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{file}: corrupt gzip file after line {number} ({error})"
        ) from error


def _existing_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        kind = "is a folder, not a file" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: {kind}")
    return file


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); "
                "each line must be one JSON object"
            ) from error
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
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{file}, row {number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{file}: corrupt parquet file after row {number} ({problem})"
        ) from error

"""Reads the lines of a text file, plain or compressed, under limits."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from rlhf_jax.files.printable import one_line, printable
from rlhf_jax.files.regular_file import MEBIBYTE, open_regular

MOST_CHARACTERS = 16 * MEBIBYTE
"""Longest line."""
MOST_EXPANSION = 200
"""Most characters per byte of a compressed file. Texts have 3 to 20."""
FREE_CHARACTERS = 4 * MEBIBYTE
"""A compressed file may always expand to as many."""


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yields `(line number from 1, line with its end)` of a text file in UTF-8.

    Files whose name ends in `.gz` are decompressed.

    Raises:
        ValueError: if the file is missing or is no file, is not UTF-8, has a line that
            is too long, or is a corrupt gzip file or one that expands out of all
            proportion. One line that begins with the path.
    """
    name = printable(os.fspath(path))
    number = 0
    with open_regular(path) as file:
        is_compressed = os.fspath(path).lower().endswith(".gz")
        left = _most_characters(file) if is_compressed else None
        raw = gzip.GzipFile(fileobj=file) if is_compressed else file
        try:
            with io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
                while line := lines.readline(MOST_CHARACTERS + 1):
                    number += 1
                    if len(line) > MOST_CHARACTERS:
                        raise ValueError(
                            f"{name}:{number}: the line is longer than "
                            f"{MOST_CHARACTERS:,} characters; split it"
                        )
                    if left is not None:
                        left -= len(line)
                        _check_expansion(name, number, left)
                    yield number, line
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not UTF-8 text somewhere after line {number} ({error.reason})"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{name}: corrupt gzip file after line {number} ({one_line(error)})"
            ) from None
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror} after line {number}") from None


def _most_characters(file: BinaryIO) -> int:
    size = os.fstat(file.fileno()).st_size
    return max(FREE_CHARACTERS, MOST_EXPANSION * size)


def _check_expansion(name: str, number: int, left: int) -> None:
    if left < 0:
        raise ValueError(
            f"{name}:{number}: the file has expanded to more than {MOST_EXPANSION} "
            "characters per byte so far; if it is really data, decompress it first"
        )

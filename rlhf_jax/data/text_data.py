"""Prompts, demonstrations and human preferences from files.

The first row of a file determines its form; all rows must have the same form:

    preferences              prompt, chosen, rejected
    whole dialogues          chosen, rejected; their common prefix is the prompt
    chat                     messages: a list of {"role": ..., "content": ...}
    prompt and completion    prompt, and completion or response
    prompt                   prompt
    plain text               text, or a .txt file

`Columns` renames the columns. Prompts and responses may be text or chat messages;
messages are rendered with the caller's `render_chat`.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, Literal, TypeVar, cast

from rlhf_jax.data.dialogues import RenderChat, Unusable
from rlhf_jax.data.row_files import Row, is_text_file, read_rows
from rlhf_jax.data.row_forms import (
    EMPTY_TEXT,
    Columns,
    Example,
    Parsed,
    Parser,
    PreferencePair,
    TrainOn,
    example_parser,
    pair_parser,
    prompt_parser,
)
from rlhf_jax.files.bounded_lines import read_lines
from rlhf_jax.files.printable import shown

__all__ = [
    "Columns",
    "Example",
    "OnUnusable",
    "PreferencePair",
    "PromptRow",
    "RenderChat",
    "TextRows",
    "TrainOn",
    "read_examples",
    "read_pairs",
    "read_prompt_rows",
    "read_prompts",
]

OnUnusable = Literal["fail", "drop"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TextRows(Generic[T]):
    """The usable rows of a file, and the number of skipped rows by reason."""

    rows: list[T]
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """A prompt and the other columns of its row, such as the correct answer."""

    prompt: str
    columns: dict[str, Any]


def read_examples(
    path: str | os.PathLike[str],
    *,
    columns: Columns | None = None,
    render_chat: RenderChat | None = None,
    on_unusable: OnUnusable = "fail",
    train_on: TrainOn = "last-answer",
) -> TextRows[Example]:
    """Demonstrations for supervised fine-tuning, or questions with answers.

    The completion is the last chat message, which must be the assistant's, or the
    chosen response of a preference. A `.txt` file is one plain text.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.parquet` or `.txt` file.
        columns: names of the columns; None for the usual ones.
        render_chat: turns chat messages into text.
        on_unusable: what to do with rows whose prompt, completion or text is blank, or
            conversations that `render_chat` rejects.
        train_on: "all-answers" trains on every assistant turn; for chat messages only.

    Raises:
        ValueError: one line that names the file, the line and what is wrong.
    """
    if train_on not in ("last-answer", "all-answers"):
        raise ValueError(
            f'train_on={shown(train_on)}: give "last-answer" or "all-answers"'
        )
    if is_text_file(path):
        if train_on == "all-answers":
            raise ValueError(
                f'{path}: train_on="all-answers" is for chat messages, and a .txt file '
                'has none; use "last-answer", or give .jsonl, .jsonl.gz or .parquet'
            )
        text = "".join(line for _, line in read_lines(path))
        reason = None if text.strip() else EMPTY_TEXT
        return _collect([(str(path), (Example("", text), reason))], on_unusable)
    choose_parser = partial(example_parser, train_on=train_on)
    return _read(path, choose_parser, columns, render_chat, on_unusable)


def read_pairs(
    path: str | os.PathLike[str],
    *,
    columns: Columns | None = None,
    render_chat: RenderChat | None = None,
    on_unusable: OnUnusable = "fail",
) -> TextRows[PreferencePair]:
    """Human preferences, for a reward model.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        columns: names of the columns; None for the usual ones.
        render_chat: turns chat messages into text.
        on_unusable: what to do with pairs of identical responses, with a blank prompt,
            without a common prefix, or that `render_chat` rejects.

    Raises:
        ValueError: one line that names the file, the line and what is wrong.
    """
    if is_text_file(path):
        raise ValueError(
            f"{path}: a .txt file has no preferences; give .jsonl, .jsonl.gz or "
            ".parquet"
        )
    return _read(path, pair_parser, columns, render_chat, on_unusable)


def read_prompts(
    path: str | os.PathLike[str],
    *,
    columns: Columns | None = None,
    render_chat: RenderChat | None = None,
    on_unusable: OnUnusable = "fail",
) -> TextRows[str]:
    """The prompts of a file of any form; in a `.txt` file, each nonblank line.

    For plain text the full text is the prompt; for chat messages, everything before the
    last assistant turn, or all messages if there is none.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.parquet` or `.txt` file.
        columns: names of the columns; None for the usual ones.
        render_chat: turns chat messages into text.
        on_unusable: what to do with rows whose prompt is blank, or that `render_chat`
            rejects.

    Raises:
        ValueError: one line that names the file, the line and what is wrong.
    """
    if is_text_file(path):
        lines = [line.rstrip("\n") for _, line in read_lines(path)]
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"{path}: the file has no line with text")
        return TextRows(prompts, {})
    return _read(path, prompt_parser, columns, render_chat, on_unusable)


def read_prompt_rows(
    path: str | os.PathLike[str],
    *,
    columns: Columns | None = None,
    keep: Sequence[str] | None = None,
    render_chat: RenderChat | None = None,
    on_unusable: OnUnusable = "fail",
) -> TextRows[PromptRow]:
    """The prompts of a file, as in `read_prompts`, with other columns.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.parquet` or `.txt` file.
        columns: names of the columns; None for the usual ones.
        keep: columns to keep, which every row must have; None: those of the first row,
            except the prompt column.
        render_chat: turns chat messages into text.
        on_unusable: what to do with rows whose prompt is blank, or that `render_chat`
            rejects.

    Raises:
        ValueError: one line that names the file, the line and the problem, such as a
            missing or null column.
    """
    if is_text_file(path):
        if keep:
            raise ValueError(
                f"{path}: a .txt file has no column {shown(keep[0])}; give .jsonl, "
                ".jsonl.gz or .parquet"
            )
        found = read_prompts(path, on_unusable=on_unusable)
        return TextRows([PromptRow(text, {}) for text in found.rows], found.dropped)

    def choose_parser(first: Row, columns: Columns) -> Parser[PromptRow]:
        parse = prompt_parser(first, columns)
        kept = keep
        if kept is None:
            own = (columns.prompt, columns.messages)
            kept = [name for name, x in first.values.items() if x is not None]
            kept = [name for name in kept if name not in own]

        def parse_row(
            row: Row, columns: Columns, render_chat: RenderChat | None
        ) -> Parsed[PromptRow]:
            prompt, reason = parse(row, columns, render_chat)
            for name in kept:
                if row[name] is None:
                    raise row.error(
                        f"column {shown(name)} is null; fill it in, or list the "
                        "columns that reward functions need with reward-columns"
                    )
            return PromptRow(prompt, {name: row[name] for name in kept}), reason

        return parse_row

    return _read(path, choose_parser, columns, render_chat, on_unusable)


def _read(
    path: str | os.PathLike[str],
    choose_parser: Callable[[Row, Columns], Parser[T]],
    columns: Columns | None,
    render_chat: RenderChat | None,
    on_unusable: OnUnusable,
) -> TextRows[T]:
    columns = columns or Columns()
    parsed: list[tuple[str, Parsed[T]]] = []
    parse = None
    for row in read_rows(path):
        if parse is None:
            columns.check_used(row)
            parse = choose_parser(row, columns)
        try:
            parsed.append((row.where, parse(row, columns, render_chat)))
        except Unusable as error:  # its message takes the place of the item
            parsed.append((row.where, (cast(T, None), str(error))))
    return _collect(parsed, on_unusable)


def _collect(
    parsed: list[tuple[str, Parsed[T]]], on_unusable: OnUnusable
) -> TextRows[T]:
    """Separates usable rows from the others, which are counted."""
    if on_unusable not in ("fail", "drop"):
        raise ValueError(f'on_unusable={shown(on_unusable)}: give "fail" or "drop"')
    rows = [item for _, (item, reason) in parsed if reason is None]
    unusable = [(where, reason) for where, (_, reason) in parsed if reason is not None]
    dropped = dict(Counter(reason for _, reason in unusable))
    if unusable and (on_unusable == "fail" or not rows):
        where, reason = unusable[0]
        counts = ", ".join(f"{count} × {reason}" for reason, count in dropped.items())
        remedy = ' or skip them with on_unusable="drop"' if rows else ""
        raise ValueError(
            f"{where}: {reason}; {len(unusable)} of {len(parsed)} rows are unusable "
            f"({counts}); correct them{remedy}"
        )
    return TextRows(rows, dropped)

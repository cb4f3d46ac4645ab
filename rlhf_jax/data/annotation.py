"""Annotation files: written for annotators to fill in, then read back.

The responses to a prompt are shuffled, so that their position does not reveal their
source, and labeled A, B, C …. Next to the file is its key, `<file>.key.json`, with the
texts and their true order. Texts are read from the key, so it does not matter if a
spreadsheet alters them.
"""

import csv
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.data.judgements import Judgement, RatingScale, grades_of_ranking
from rlhf_jax.data.row_files import Row, read_rows
from rlhf_jax.data.text_data import OnUnusable, TextRows
from rlhf_jax.files.bounded_json import parse_json
from rlhf_jax.files.bounded_lines import read_lines
from rlhf_jax.files.printable import one_line, shown
from rlhf_jax.files.regular_file import MEBIBYTE, read_text
from rlhf_jax.files.typed_fields import Fields, section, text

Kind = Literal["ranking", "rating"]

UNFILLED = "not filled in"
MAX_CELL = 32_767  # characters, in the usual spreadsheets
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXAMPLE = "B > A = C"
KEY_BYTES, KEY_VALUES = 256 * MEBIBYTE, 10_000_000
"""Largest key of an annotation file; it has all its texts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """One row of an annotation file."""

    prompt: str
    answers: list[str]  # in the given order, without duplicates
    order: list[int]  # for each letter, the index of its response

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.order)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotationKey:
    """The tasks of an annotation file, and their texts."""

    kind: Kind
    scale: RatingScale
    tasks: dict[str, _Task]  # by id


def write_annotation_file(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    kind: Kind = "ranking",
    scale: RatingScale | None = None,
    seed: int = 0,
) -> int:
    """Writes the file and its key; returns the number of prompts.

    The columns are `id`, `prompt`, `answer A`, `answer B` … and an empty `ranking`, or
    `rating A` and so on after each response. `instructions` explains the valid entries.
    Identical responses to a prompt are shown once, and prompts without two different
    responses are skipped for rankings.

    Args:
        path: a `.csv` file, which opens in spreadsheets, or a `.jsonl` file; must not
            exist, to protect files already filled in.
        prompts: `[N]` texts.
        responses: `[N]` lists of at most 26 responses each; lengths may differ.
        kind: whether responses are ranked or rated individually.
        scale: the rating scale; None for numbers from 1 to 5. Only for ratings.
        seed: for shuffling the responses, at least 0.

    Raises:
        ValueError: if the file exists or has another extension, if prompts and
            responses do not match, or if a text is too long for a spreadsheet.
    """
    file = Path(path)
    _check_writing(file, prompts, responses, kind, seed)
    generator = np.random.default_rng(seed)
    least = 2 if kind == "ranking" else 1
    tasks: dict[str, _Task] = {}
    for prompt, given in zip(prompts, responses, strict=True):
        answers = list(dict.fromkeys(given))
        if len(answers) >= least:
            order = generator.permutation(len(answers)).tolist()
            task = _Task(prompt=prompt, answers=answers, order=order)
            tasks[str(len(tasks) + 1)] = task
    if not tasks:
        raise ValueError(f"{file}: no prompt has {least} different responses to judge")
    key = AnnotationKey(kind=kind, scale=scale or RatingScale(), tasks=tasks)
    width = max(len(task.order) for task in tasks.values())
    rows = [_cells(id_, task, key, width) for id_, task in tasks.items()]
    (_write_csv if file.suffix == ".csv" else _write_jsonl)(file, rows)
    key_path(file).write_text(
        json.dumps(dataclasses.asdict(key), ensure_ascii=False, indent=1),
        encoding="utf-8",
    )
    return len(tasks)


def read_annotation_file(
    path: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str] | None = None,
    annotator: str | None = None,
    on_unfilled: OnUnusable = "fail",
) -> TextRows[Judgement]:
    """Reads a filled-in file; responses are in their original order.

    Rows may be reordered and columns added. Semicolons or tabs instead of commas are
    accepted.

    Args:
        path: the filled-in file, `.csv` or `.jsonl`, under any name.
        key: its key; None: the one written next to it.
        annotator: who filled it in; None: use the file's name.
        on_unfilled: what to do with empty or missing rows: "fail", or "drop" to skip
            and count them.

    Raises:
        ValueError: one line that names the file, row, column, value and the fix. Rows
            of a `.csv` file are numbered as in spreadsheets, with the header as row 1.
    """
    if on_unfilled not in ("fail", "drop"):
        raise ValueError(f'on_unfilled={shown(on_unfilled)}: give "fail" or "drop"')
    file = Path(path)
    known = read_key(file, key)
    annotator = annotator if annotator is not None else str(file)
    judgements: list[Judgement] = []
    places: dict[str, str] = {}
    unfilled: list[str] = []
    for row in _read_csv(file) if file.suffix.lower() == ".csv" else read_rows(file):
        id_, task = _task_of(row, known, places)
        places[id_] = row.where
        empty = _empty_columns(row, task, known.kind)
        if empty:
            unfilled.append(f"{row.where}: column {shown(empty[0])} is empty")
            continue
        judgements.append(_judgement(row, task, known, annotator))
    missing = [id_ for id_ in known.tasks if id_ not in places]
    unfilled += [f"{file}: no row has the id {shown(id_)}" for id_ in missing]
    if unfilled and (on_unfilled == "fail" or not judgements):
        remedy = ' or skip them with on_unfilled="drop"' if judgements else ""
        raise ValueError(
            f"{unfilled[0]}; {len(unfilled)} of {len(known.tasks)} prompts are "
            f"{UNFILLED}: write {_expected(known)}{remedy}"
        )
    return TextRows(judgements, {UNFILLED: len(unfilled)} if unfilled else {})


def key_path(path: str | os.PathLike[str]) -> Path:
    """The path of the key of an annotation file."""
    return Path(f"{os.fspath(path)}.key.json")


def read_key(
    path: str | os.PathLike[str], key: str | os.PathLike[str] | None = None
) -> AnnotationKey:
    """The key of an annotation file.

    Args:
        path: the annotation file.
        key: its key; None: the one written next to it.

    Raises:
        ValueError: if the file is missing or is not a key.
    """
    file = key_path(path) if key is None else Path(key)
    written = read_text(file, most_bytes=KEY_BYTES)
    try:
        fields = section(
            {"it": parse_json(written, "it", most_values=KEY_VALUES)}, "it"
        )
        kind = text(fields, "kind")
        if kind not in ("ranking", "rating"):
            raise ValueError(f"kind is {shown(kind)}")
        scale = section(fields, "scale")
        tasks = section(fields, "tasks")
        return AnnotationKey(
            kind=kind,
            scale=RatingScale(**{**scale, "labels": tuple(scale["labels"])}),
            tasks={id_: _read_task(section(tasks, id_)) for id_ in tasks},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not the key of an annotation file ({one_line(error)}); give the "
            "unmodified key that was written with it"
        ) from error


def _read_task(fields: Fields) -> _Task:
    task = _Task(**fields)
    texts = [task.prompt, *task.answers]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError("a prompt or answer is no text")
    if sorted(task.order) != list(range(len(task.answers))):
        raise ValueError("an order does not name each answer once")
    return task


def check_new_file(path: str | os.PathLike[str]) -> None:
    """Raises `ValueError` if the annotation file cannot be written."""
    file = Path(path)
    if file.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{file}: the name must end in .csv or .jsonl")
    for existing in (file, key_path(file)):
        if existing.exists():
            raise ValueError(
                f"{existing}: already exists and may be filled in; choose another name"
            )


def _check_writing(
    file: Path,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    kind: Kind,
    seed: int,
) -> None:
    if kind not in ("ranking", "rating"):
        raise ValueError(f'kind={shown(kind)}: give "ranking" or "rating"')
    if seed < 0:
        raise ValueError(f"seed={seed}: at least 0")
    check_new_file(file)
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} lists of responses; give one "
            "list per prompt"
        )
    for index, (prompt, given) in enumerate(zip(prompts, responses, strict=True)):
        longest = max(len(text) for text in (prompt, *given))
        if len(given) > len(LETTERS):
            raise ValueError(
                f"responses[{index}] has {len(given)} responses; give at "
                f"most {len(LETTERS)}"
            )
        if file.suffix == ".csv" and longest >= MAX_CELL:
            raise ValueError(
                f"prompt {index} or one of its responses has {longest} characters; "
                f"spreadsheets hold fewer than {MAX_CELL}: write a .jsonl file"
            )


def _cells(id_: str, task: _Task, key: AnnotationKey, width: int) -> dict[str, str]:
    shown_answers = [task.answers[index] for index in task.order]
    shown_answers += [""] * (width - len(shown_answers))
    cells = {"id": id_, "prompt": task.prompt}
    for letter, answer in zip(LETTERS, shown_answers, strict=False):
        cells[f"answer {letter}"] = answer
        if key.kind == "rating":
            cells[f"rating {letter}"] = ""
    cells["instructions"] = _expected(key)
    if key.kind == "ranking":
        cells["ranking"] = ""
    return cells


def _expected(key: AnnotationKey) -> str:
    """The valid entries of the columns to fill in."""
    if key.kind == "ranking":
        return f"the ranking from best to worst, such as {EXAMPLE} (= for a tie)"
    return f"the rating of each response: {key.scale.expected}"


def _write_csv(file: Path, rows: list[dict[str, str]]) -> None:
    # Spreadsheets detect UTF-8 by the byte order mark.
    with file.open("x", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _harmless(text) for name, text in row.items()})


def _harmless(text: str) -> str:
    """Escapes a text so that a spreadsheet does not run it as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _write_jsonl(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("x", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_csv(file: Path) -> Iterator[Row]:
    lines = (line for _, line in read_lines(file))
    header = next(lines, "").strip("\r\n")
    delimiter = max(",;\t", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    try:
        for number, cells in enumerate(csv.reader(lines, delimiter=delimiter), 2):
            if any(cell.strip() for cell in cells):
                values = dict(zip(names, cells, strict=False))
                yield Row(f"{file}, row {number}", values)
    except csv.Error as error:
        raise ValueError(f"{file}: not a CSV file ({error})") from error


def _task_of(row: Row, key: AnnotationKey, places: dict[str, str]) -> tuple[str, _Task]:
    id_ = str(row["id"]).strip()
    if id_ not in key.tasks:
        raise row.error(
            f'column "id" is {shown(id_)}, which is not in the key; keep the ids '
            "unchanged, and give the key of this file"
        )
    if id_ in places:
        raise row.error(
            f'column "id" is {shown(id_)}, as at {places[id_]}; keep one row per id'
        )
    return id_, key.tasks[id_]


def _empty_columns(row: Row, task: _Task, kind: Kind) -> list[str]:
    columns = [f"rating {letter}" for letter in task.letters]
    if kind == "ranking":
        columns = ["ranking"]
    return [
        column
        for column in columns
        if row[column] is None or not str(row[column]).strip()
    ]


def _judgement(row: Row, task: _Task, key: AnnotationKey, annotator: str) -> Judgement:
    if key.kind == "ranking":
        grades = _ranking(row, task.letters)
    else:
        grades = [_rating(row, f"rating {x}", key.scale) for x in task.letters]
    by_index = dict(zip(task.order, grades, strict=True))
    return Judgement(
        prompt=task.prompt,
        answers=tuple(task.answers),
        grades=tuple(by_index[index] for index in range(len(task.answers))),
        places=(row.where,) * len(task.answers),
        annotator=annotator,
    )


def _ranking(row: Row, letters: str) -> Sequence[float]:
    """The grades of responses A, B … in a ranking such as "B > A = C"."""
    value: Any = row["ranking"]
    levels = [
        level.upper().split("=") for level in re.sub(r"\s", "", str(value)).split(">")
    ]
    named = [letter for level in levels for letter in level]
    if sorted(named) != list(letters):
        example = " > ".join(reversed(letters))
        raise row.error(
            f'column "ranking" is {shown(value)}; write each of {", ".join(letters)} '
            f"once, from best to worst, such as {example}, with = for a tie"
        )
    place_of = {
        letter: place for place, level in enumerate(levels, 1) for letter in level
    }
    return grades_of_ranking([place_of[letter] for letter in letters])


def _rating(row: Row, column: str, scale: RatingScale) -> float:
    try:
        return scale.grade(row[column])
    except ValueError as error:
        raise row.error(f"column {shown(column)}: {error}") from error

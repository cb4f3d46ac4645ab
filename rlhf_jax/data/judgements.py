"""Human judgements of several responses to a prompt: ratings and rankings.

The first row of a file determines its form; all rows must have the same form:

    rated responses   prompt, response, rating; one row per response
    ratings           prompt, responses: a list, ratings: a list of the same length
    rankings          prompt, responses: a list, ranking: the rank of each response,
                      1 is the best; equal ranks are ties

All forms may have an `annotator` column: ratings in separate rows are compared if
prompt and annotator are the same. `rlhf_jax.data.comparisons` turns judgements into
training data.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data.dialogues import RenderChat, Unusable
from rlhf_jax.data.row_files import Row, is_text_file, read_rows
from rlhf_jax.data.row_forms import EMPTY_PROMPT, Columns, answered_prompt
from rlhf_jax.data.text_data import OnUnusable, TextRows
from rlhf_jax.files.printable import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Responses to one prompt, each with a grade by the same person.

    Grades are only compared within a judgement: two people's "good" may differ.
    """

    prompt: str
    answers: tuple[str, ...]
    grades: tuple[float, ...]  # one per response, higher is better; equal is a tie
    places: tuple[str, ...]  # one per response: its file and line
    annotator: str | None = None  # None: not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingScale:
    """The valid ratings.

    Raises:
        ValueError: for a scale with fewer than two ratings, or blank or duplicate
            labels.
    """

    labels: tuple[str, ...] = ()
    """labels of the ratings, from worst to best; if not set, ratings are numbers"""
    lowest: float = 1.0
    """lowest rating"""
    highest: float = 5.0
    """highest rating"""

    def __post_init__(self):
        known = {_folded(label) for label in self.labels}
        if self.labels and (len(known) < max(2, len(self.labels)) or "" in known):
            raise ValueError(
                f"labels={shown(self.labels)}: give at least two different labels, "
                'from worst to best, such as "bad", "good", "very good"'
            )
        if not self.lowest < self.highest:
            raise ValueError(
                f"lowest={self.lowest}, highest={self.highest}: the highest rating "
                "must be above the lowest"
            )

    @property
    def expected(self) -> str:
        """The valid ratings, for instructions and error messages."""
        if self.labels:
            return "one of " + ", ".join(shown(label) for label in self.labels)
        return f"a number from {self.lowest:g} to {self.highest:g}"

    def grade(self, rating: Any) -> float:
        """The rating as a number; for labels, the number of worse labels.

        Case and surrounding white space of labels are ignored. Numbers may be strings.

        Raises:
            ValueError: for ratings not on the scale; the message lists the valid ones.
        """
        grade = self._label_index(rating) if self.labels else self._number(rating)
        if grade is None:
            raise ValueError(f"{shown(rating)} is not {self.expected}")
        return grade

    def rating(self, grade: float) -> str | float:
        """The rating with this grade."""
        return self.labels[int(grade)] if self.labels else grade

    def _label_index(self, rating: Any) -> float | None:
        if not isinstance(rating, str | int) or isinstance(rating, bool):
            return None
        labels = [_folded(label) for label in self.labels]
        label = _folded(str(rating))
        return float(labels.index(label)) if label in labels else None

    def _number(self, rating: Any) -> float | None:
        if not isinstance(rating, str | int | float) or isinstance(rating, bool):
            return None
        try:
            number = float(rating)
        except (ValueError, OverflowError):
            return None
        # Comparisons with NaN are false.
        return number if self.lowest <= number <= self.highest else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgementColumns:
    """Column names of a file."""

    prompt: str = "prompt"
    response: str = "response"
    rating: str = "rating"
    responses: str = "responses"
    ratings: str = "ratings"
    ranking: str = "ranking"
    annotator: str = "annotator"

    def check_used(self, row: Row) -> None:
        """Raises `ValueError` if the row lacks a column that the user named."""
        for field in dataclasses.fields(self):
            name = getattr(self, field.name)
            if name != field.default:
                row[name]


def read_judgements(
    path: str | os.PathLike[str],
    *,
    scale: RatingScale | None = None,
    columns: JudgementColumns | None = None,
    render_chat: RenderChat | None = None,
    on_unusable: OnUnusable = "fail",
) -> TextRows[Judgement]:
    """Ratings or rankings, one judgement per row of the file.

    Prompts and responses are text or chat messages; a response may be empty.

    Args:
        path: a `.jsonl`, `.jsonl.gz` or `.parquet` file.
        scale: the rating scale; None for numbers from 1 to 5.
        columns: column names; None for the defaults.
        render_chat: renders chat messages as text.
        on_unusable: what to do with rows whose prompt is blank, or that `render_chat`
            rejects.

    Raises:
        ValueError: one line that names the file, line, column, value and the fix.
    """
    if on_unusable not in ("fail", "drop"):
        raise ValueError(f'on_unusable={shown(on_unusable)}: give "fail" or "drop"')
    if is_text_file(path):
        raise ValueError(
            f"{path}: a .txt file has no judgements; give .jsonl, .jsonl.gz or .parquet"
        )
    scale, columns = scale or RatingScale(), columns or JudgementColumns()
    judgements: list[Judgement] = []
    form, dropped = None, Counter[str]()
    for row in read_rows(path):
        if form is None:
            columns.check_used(row)
            form = _form(row, columns)
        answers, grade_column = form
        try:
            judgements.append(
                _judgement(row, answers, grade_column, columns, scale, render_chat)
            )
        except Unusable as error:
            if on_unusable == "fail":
                raise row.error(
                    f"{error}; correct the row or skip such rows with "
                    'on_unusable="drop"'
                ) from None
            dropped[str(error)] += 1
    if not judgements:
        counts = ", ".join(f"{count} × {reason}" for reason, count in dropped.items())
        raise ValueError(f"{path}: no row is usable: {counts}")
    return TextRows(judgements, dict(dropped))


def judgement_rows(
    judgements: Sequence[Judgement], *, scale: RatingScale | None
) -> list[dict[str, Any]]:
    """Judgements as rows for a file that `read_judgements` can read.

    Args:
        judgements: all ratings, or all rankings.
        scale: of the ratings; use the same scale to read them. None: rankings.
    """
    rows = []
    for judgement in judgements:
        row: dict[str, Any] = {
            "prompt": judgement.prompt,
            "responses": list(judgement.answers),
        }
        if scale is None:
            row["ranking"] = ranking_of_grades(judgement.grades)
        else:
            row["ratings"] = [scale.rating(grade) for grade in judgement.grades]
        if judgement.annotator is not None:
            row["annotator"] = judgement.annotator
        rows.append(row)
    return rows


def ranking_of_grades(grades: Sequence[float]) -> list[int]:
    """The rank of each response, 1 for the best; equal grades share a rank."""
    from_best = sorted(set(grades), reverse=True)
    return [1 + from_best.index(grade) for grade in grades]


def grades_of_ranking(places: Sequence[float]) -> tuple[float, ...]:
    """Ranks, 1 for the best, as grades: the number of worse ranks.

    Raises:
        ValueError: if the ranks are not whole numbers from 1 for the best to at most
            the number of responses.
    """
    whole = all(_is_whole(place) for place in places)
    if not whole or not places or min(places) != 1 or max(places) > len(places):
        raise ValueError(
            f"{shown(list(places))} does not give the rank of each response, from 1 "
            f"for the best to at most {len(places)}"
        )
    from_worst = sorted(set(places), reverse=True)
    return tuple(float(from_worst.index(place)) for place in places)


def _form(first: Row, columns: JudgementColumns) -> tuple[str, str]:
    """The response and grade columns in rows such as `first`."""
    forms = [
        (columns.response, columns.rating),
        (columns.responses, columns.ratings),
        (columns.responses, columns.ranking),
    ]
    found = [form for form in forms if set(form) <= first.values.keys()]
    if columns.prompt not in first.values or len(found) != 1:
        expected = ", or ".join(f"{shown(a)} and {shown(g)}" for a, g in forms)
        raise first.error(
            f"the row has the columns {first.column_names}; expected "
            f"{shown(columns.prompt)} and one of: {expected}; if they have other "
            "names, give them as columns"
        )
    return found[0]


def _judgement(
    row: Row,
    answer_column: str,
    grade_column: str,
    columns: JudgementColumns,
    scale: RatingScale,
    render_chat: RenderChat | None,
) -> Judgement:
    """The row's judgement; raises `Unusable` if its prompt is blank."""
    answers, marks = row[answer_column], row[grade_column]
    if answer_column == columns.response:
        answers, marks = [answers], [marks]
    _check_lists(row, answer_column, answers, grade_column, marks)
    try:
        if grade_column == columns.ranking:
            grades = grades_of_ranking(marks)
        else:
            grades = tuple(scale.grade(mark) for mark in marks)
    except ValueError as error:
        raise row.error(f"column {shown(grade_column)}: {error}") from error
    texts = []
    names = Columns(prompt=columns.prompt, completion=answer_column)
    for answer in answers:
        values = {columns.prompt: row[columns.prompt], answer_column: answer}
        alone = Row(row.where, values)
        text, reason = answered_prompt(alone, names, render_chat)
        if reason == EMPTY_PROMPT:
            raise Unusable(reason)
        texts.append(text)
    return Judgement(
        prompt=texts[0][0],
        answers=tuple(answer for _, answer in texts),
        grades=grades,
        places=(row.where,) * len(texts),
        annotator=_annotator(row, columns.annotator),
    )


def _check_lists(
    row: Row, answer_column: str, answers: Any, grade_column: str, marks: Any
) -> None:
    for column, value in ((answer_column, answers), (grade_column, marks)):
        if not isinstance(value, list) or not value:
            raise row.error(
                f"column {shown(column)} is {shown(value)}, not a list with one entry "
                "per response"
            )
    if len(answers) != len(marks):
        raise row.error(
            f"column {shown(grade_column)} has {len(marks)} entries for the "
            f"{len(answers)} in column {shown(answer_column)}; give one for each"
        )


def _annotator(row: Row, column: str) -> str | None:
    value = row.values.get(column)
    if value is None:
        return None
    if isinstance(value, str | int | float) and not _is_blank_or_nan(value):
        return str(value)
    raise row.error(
        f"column {shown(column)} is {shown(value)}; give a name, a number, or null if "
        "unknown"
    )


def _is_blank_or_nan(value: str | int | float) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, float) and math.isnan(value)


def _is_whole(number: Any) -> bool:
    if isinstance(number, float):  # integers in a column with nulls are floats
        return number.is_integer()
    return isinstance(number, int) and not isinstance(number, bool)


def _folded(label: str) -> str:
    return " ".join(label.split()).casefold()

"""Parses one row of a file: an example, a preference or a prompt."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from rlhf_jax.data.dialogues import (
    Message,
    RenderChat,
    Span,
    earlier_answers,
    messages_in,
    render_answer,
    render_prompt,
    split_conversations,
    split_dialogues,
)
from rlhf_jax.data.row_files import Row
from rlhf_jax.files.printable import shown

T = TypeVar("T")
TrainOn = Literal["last-answer", "all-answers"]

EQUAL = "chosen equals rejected"
NOTHING_SHARED = "chosen and rejected have no common prefix to use as the prompt"
EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
EMPTY_TEXT = "empty text"


@dataclasses.dataclass(frozen=True)
class Example:
    """A completion to train on; with an empty prompt it is plain text."""

    prompt: str
    completion: str
    # Spans of earlier responses in the prompt to train on, from left to right.
    earlier_answers: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt; the first was preferred.

    A response may be empty.
    """

    prompt: str
    chosen: str
    rejected: str
    # Target difference of the scores of the responses.
    margin: float = dataclasses.field(default=0.0, kw_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Column names of a file."""

    prompt: str = "prompt"
    completion: str | None = None  # None: "completion" or "response"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    text: str = "text"

    def completion_in(self, row: Row) -> str | None:
        """The name of the row's completion column; None if it has none."""
        names = (self.completion,) if self.completion else ("completion", "response")
        return next((name for name in names if name in row.values), None)

    def check_used(self, row: Row) -> None:
        """Raises `ValueError` if the row lacks a column that the user named."""
        usual = dataclasses.asdict(Columns())
        for field, name in dataclasses.asdict(self).items():
            if name != usual[field]:
                row[name]


Parsed = tuple[T, str | None]
"""The parsed row, and the reason why it is unusable, if any."""

Parser = Callable[[Row, Columns, RenderChat | None], Parsed[T]]


def example_parser(
    first: Row, columns: Columns, *, train_on: TrainOn = "last-answer"
) -> Parser[Example]:
    """The parser for rows such as `first`, for examples."""
    has = first.values.keys()
    if columns.messages in has:
        return partial(_example_from_messages, train_on=train_on)
    if columns.prompt in has and columns.completion_in(first):
        return partial(_example_from_completion, train_on=train_on)
    if {columns.chosen, columns.rejected} <= has:
        return partial(_example_from_pair, train_on=train_on)
    if columns.text in has:
        return partial(_example_from_text, train_on=train_on)
    expected = '"messages", "prompt" and "completion", "chosen" and "rejected", "text"'
    raise _unknown_form(first, f"one of {expected}")


def pair_parser(first: Row, columns: Columns) -> Parser[PreferencePair]:
    """The parser for rows such as `first`, for preferences."""
    if not {columns.chosen, columns.rejected} <= first.values.keys():
        raise _unknown_form(first, '"chosen" and "rejected", with or without "prompt"')
    return _pair_with_prompt if columns.prompt in first.values else _pair_of_dialogues


def prompt_parser(first: Row, columns: Columns) -> Parser[str]:
    """The parser for rows such as `first`, for prompts."""
    has = first.values.keys()
    if {columns.chosen, columns.rejected} <= has:
        return _prompt_from_pair
    if columns.prompt in has:
        return _prompt_from_prompt
    if columns.messages in has:
        return _prompt_from_messages
    if columns.text in has:
        return _prompt_from_text
    expected = '"prompt", "messages", "chosen" and "rejected", "text"'
    raise _unknown_form(first, f"one of {expected}")


def _unknown_form(first: Row, expected: str) -> ValueError:
    return first.error(
        f"the row has the columns {first.column_names}; expected {expected}; if they "
        "have other names, give them as columns"
    )


def answered_prompt(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[tuple[str, str]]:
    """A prompt and the full text next to it as its response."""
    prompt, reason = _prompt_from_prompt(row, columns, render_chat)
    name = columns.completion_in(row)
    if name is None:
        raise row.error(f'no column "completion"; this row has {row.column_names}')
    answer = _answer(row, columns.prompt, name, render_chat)
    if reason is None and _is_blank(row[name]):
        reason = EMPTY_COMPLETION
    return (prompt, answer), reason


def _example_from_messages(
    row: Row, columns: Columns, render_chat: RenderChat | None, *, train_on: TrainOn
) -> Parsed[Example]:
    messages = messages_in(row, columns.messages)
    return _example_of(row, columns.messages, messages, render_chat, train_on)


def _example_from_completion(
    row: Row, columns: Columns, render_chat: RenderChat | None, *, train_on: TrainOn
) -> Parsed[Example]:
    (prompt, completion), reason = answered_prompt(row, columns, render_chat)
    before = row[columns.prompt]
    if not isinstance(before, list):
        _refuse_text(row, columns.prompt, train_on)
        return Example(prompt, completion), reason
    name = columns.completion_in(row)
    assert name is not None  # answered_prompt has rejected it
    if isinstance(row[name], list):
        messages = before + row[name]
        example, blank = _example_of(row, name, messages, render_chat, train_on)
        return example, reason or blank
    answers = (
        earlier_answers(row, before, render_chat) if train_on == "all-answers" else ()
    )
    return Example(prompt, completion, answers), reason


def _example_from_pair(
    row: Row, columns: Columns, render_chat: RenderChat | None, *, train_on: TrainOn
) -> Parsed[Example]:
    pair, reason = pair_parser(row, columns)(row, columns, render_chat)
    if reason == EQUAL:  # no preference, but still a demonstration
        reason = None
    chosen = row[columns.chosen]
    if not isinstance(chosen, list):
        _refuse_text(row, columns.chosen, train_on)
        if reason is None and not pair.chosen.strip():
            reason = EMPTY_COMPLETION
        return Example(pair.prompt, pair.chosen), reason
    if reason is not None:
        return Example(pair.prompt, pair.chosen), reason
    before = row.values.get(columns.prompt)
    messages = before + chosen if isinstance(before, list) else chosen
    return _example_of(row, columns.chosen, messages, render_chat, train_on)


def _example_from_text(
    row: Row, columns: Columns, render_chat: RenderChat | None, *, train_on: TrainOn
) -> Parsed[Example]:
    text, reason = _prompt_from_text(row, columns, render_chat)
    _refuse_text(row, columns.text, train_on)
    return Example("", text), reason


def _example_of(
    row: Row,
    column: str,
    messages: list[Message],
    render_chat: RenderChat | None,
    train_on: TrainOn,
) -> Parsed[Example]:
    """A full conversation; trains on the last response, or on all."""
    *before, last = messages
    if last["role"] != "assistant" or not before:
        roles = [message["role"] for message in messages]
        raise row.error(
            f"column {shown(column)} has the roles {shown(roles)}; the last must be "
            '"assistant", after at least one message'
        )
    answers, learnt = (), [last]
    if train_on == "all-answers":
        answers = earlier_answers(row, before, render_chat)
        learnt += [m for m in before[1:] if m["role"] == "assistant"]
    example = Example(
        render_prompt(row, before, render_chat),
        render_answer(row, before, [last], render_chat),
        answers,
    )
    blank = any(_is_blank([message]) for message in learnt)
    return example, EMPTY_COMPLETION if blank else None


def _refuse_text(row: Row, column: str, train_on: TrainOn) -> None:
    if train_on == "all-answers":
        raise row.error(
            f"column {shown(column)} is text, in which responses cannot be "
            'identified; use train_on="last-answer", or give chat messages'
        )


def _pair_with_prompt(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[PreferencePair]:
    chosen, rejected = row[columns.chosen], row[columns.rejected]
    if isinstance(row[columns.prompt], str) and isinstance(chosen, list):
        # The prompt repeats the common prefix of both conversations.
        return _pair_of_conversations(row, columns, render_chat)
    prompt, reason = _prompt_from_prompt(row, columns, render_chat)
    answers = [
        _answer(row, columns.prompt, name, render_chat)
        for name in (columns.chosen, columns.rejected)
    ]
    if reason is None and chosen == rejected:
        reason = EQUAL
    return PreferencePair(prompt, *answers), reason


def _pair_of_dialogues(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[PreferencePair]:
    if isinstance(row[columns.chosen], list):
        return _pair_of_conversations(row, columns, render_chat)
    pair = PreferencePair(
        *split_dialogues(row.text(columns.chosen), row.text(columns.rejected))
    )
    if not pair.prompt.strip():
        return pair, NOTHING_SHARED
    return pair, EQUAL if pair.chosen == pair.rejected else None


def _pair_of_conversations(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[PreferencePair]:
    before, chosen, rejected = split_conversations(
        messages_in(row, columns.chosen), messages_in(row, columns.rejected)
    )
    if not before:
        return PreferencePair("", "", ""), NOTHING_SHARED
    pair = PreferencePair(
        render_prompt(row, before, render_chat),
        render_answer(row, before, chosen, render_chat),
        render_answer(row, before, rejected, render_chat),
    )
    return pair, EQUAL if chosen == rejected else None


def _prompt_from_prompt(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[str]:
    value = row[columns.prompt]
    if isinstance(value, list):
        prompt = render_prompt(row, messages_in(row, columns.prompt), render_chat)
    else:
        prompt = row.text(columns.prompt)
    return prompt, EMPTY_PROMPT if _is_blank(value) else None


def _prompt_from_messages(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[str]:
    messages = messages_in(row, columns.messages)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise row.error(
            f"column {shown(columns.messages)} has a response and nothing before it"
        )
    prompt = render_prompt(row, messages, render_chat)
    return prompt, EMPTY_PROMPT if _is_blank(messages) else None


def _prompt_from_pair(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[str]:
    pair, reason = pair_parser(row, columns)(row, columns, render_chat)
    return pair.prompt, None if reason == EQUAL else reason


def _prompt_from_text(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[str]:
    text = row.text(columns.text)
    return text, None if text.strip() else EMPTY_TEXT


def _answer(
    row: Row, prompt_column: str, column: str, render_chat: RenderChat | None
) -> str:
    """The text of a response in a column next to its prompt.

    Text is used as is after either kind of prompt, so the reference answer to a chat
    prompt is not formatted with the template.
    """
    if not isinstance(row[column], list):
        return row.text(column)
    answer = messages_in(row, column)
    if not isinstance(row[prompt_column], list):
        raise row.error(
            f"column {shown(prompt_column)} is text and column {shown(column)} is chat "
            "messages; give both as text or both as messages"
        )
    before = messages_in(row, prompt_column)
    return render_answer(row, before, answer, render_chat)


def _is_blank(value: str | list[dict[str, Any]]) -> bool:
    """Whether a text, or every chat message, is only white space."""
    texts = [value] if isinstance(value, str) else [m["content"] for m in value]
    return not any(text.strip() for text in texts)

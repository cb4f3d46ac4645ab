"""What one row of a file says: an example, a preference or a prompt."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_jax.runtime.dialogues import (
    RenderChat,
    messages_in,
    render_answer,
    render_prompt,
    split_conversations,
    split_dialogues,
)
from rlhf_jax.runtime.row_files import Row, shown

T = TypeVar("T")

EQUAL = "chosen equals rejected"
NOTHING_SHARED = "chosen and rejected have no common beginning to be the prompt"
EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
EMPTY_TEXT = "empty text"


@dataclasses.dataclass(frozen=True)
class Example:
    """A completion to imitate; an empty prompt makes it plain text."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, of which a person preferred the first.

    An answer may be empty: to say nothing can be what the person preferred.
    """

    prompt: str
    chosen: str
    rejected: str
    # By how much the scores of the answers should differ.
    margin: float = dataclasses.field(default=0.0, kw_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """What the columns of a file are called."""

    prompt: str = "prompt"
    completion: str | None = None  # None: "completion" or "response"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str = "rejected"
    text: str = "text"

    def completion_in(self, row: Row) -> str | None:
        """The name of the row's completion column; None where it has none."""
        names = (self.completion,) if self.completion else ("completion", "response")
        return next((name for name in names if name in row.values), None)

    def check_used(self, row: Row) -> None:
        """Raises `ValueError` where the row lacks a column that the user named."""
        usual = dataclasses.asdict(Columns())
        for field, name in dataclasses.asdict(self).items():
            if name != usual[field]:
                row[name]


Parsed = tuple[T, str | None]
"""What the row says, and the reason why it cannot be used, if there is one."""

Parser = Callable[[Row, Columns, RenderChat | None], Parsed[T]]


def example_parser(first: Row, columns: Columns) -> Parser[Example]:
    """The reader of rows such as `first`, for examples."""
    has = first.values.keys()
    if columns.messages in has:
        return _example_from_messages
    if columns.prompt in has and columns.completion_in(first):
        return _example_from_completion
    if {columns.chosen, columns.rejected} <= has:
        return _example_from_pair
    if columns.text in has:
        return _example_from_text
    expected = '"messages", "prompt" and "completion", "chosen" and "rejected", "text"'
    raise _unknown_form(first, f"one of {expected}")


def pair_parser(first: Row, columns: Columns) -> Parser[PreferencePair]:
    """The reader of rows such as `first`, for preferences."""
    if not {columns.chosen, columns.rejected} <= first.values.keys():
        raise _unknown_form(first, '"chosen" and "rejected", with or without "prompt"')
    return _pair_with_prompt if columns.prompt in first.values else _pair_of_dialogues


def prompt_parser(first: Row, columns: Columns) -> Parser[str]:
    """The reader of rows such as `first`, for prompts."""
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
        f"the row has the columns {first.column_names}; expected {expected}. If they "
        "have other names, give them as columns"
    )


def _example_from_messages(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[Example]:
    *before, last = messages_in(row, columns.messages)
    if last["role"] != "assistant" or not before:
        roles = [message["role"] for message in [*before, last]]
        raise row.error(
            f"column {shown(columns.messages)} has the roles {shown(roles)}; the last "
            'must be "assistant", which answers at least one message'
        )
    example = Example(
        render_prompt(row, before, render_chat),
        render_answer(row, before, [last], render_chat),
    )
    return example, EMPTY_COMPLETION if _is_blank([last]) else None


def _example_from_completion(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[Example]:
    prompt, reason = _prompt_from_prompt(row, columns, render_chat)
    name = columns.completion_in(row)
    if name is None:
        raise row.error(f'no column "completion"; this row has {row.column_names}')
    completion = _answer(row, columns.prompt, name, render_chat)
    if reason is None and _is_blank(row[name]):
        reason = EMPTY_COMPLETION
    return Example(prompt, completion), reason


def _example_from_pair(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[Example]:
    pair, reason = pair_parser(row, columns)(row, columns, render_chat)
    if reason == EQUAL:  # no preference, but a demonstration all the same
        reason = None
    if reason is None and not pair.chosen.strip():
        reason = EMPTY_COMPLETION
    return Example(pair.prompt, pair.chosen), reason


def _example_from_text(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[Example]:
    text, reason = _prompt_from_text(row, columns, render_chat)
    return Example("", text), reason


def _pair_with_prompt(
    row: Row, columns: Columns, render_chat: RenderChat | None
) -> Parsed[PreferencePair]:
    chosen, rejected = row[columns.chosen], row[columns.rejected]
    if isinstance(row[columns.prompt], str) and isinstance(chosen, list):
        # The prompt repeats what both conversations begin with.
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
            f"column {shown(columns.messages)} has an answer and nothing before it"
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
    """The text of an answer, which stands in a column beside its prompt.

    Text stands for itself, after a prompt of either kind: so the reference answer to a
    chat prompt keeps free of the template.
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
    """Whether a text, or every one of some chat messages, is white space alone."""
    texts = [value] if isinstance(value, str) else [m["content"] for m in value]
    return not any(text.strip() for text in texts)

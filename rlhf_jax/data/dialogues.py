"""Splits dialogues, as text or chat messages, into prompt and response."""

import bisect
import re
from collections.abc import Sequence
from typing import Any, Protocol

from rlhf_jax.data.row_files import Row
from rlhf_jax.files.printable import shown

Message = dict[str, Any]  # {"role": str, "content": str, ...}

ANSWER_MARKER = "\n\nAssistant:"
"""The marker before a response in the dialogues of Bai et al., 2022,
arXiv:2204.05862."""

Span = tuple[int, int]
"""Start and end of a piece of text, in characters, end exclusive."""

_LAST_WORD = re.compile(r"\s+\S*\Z")


class RenderChat(Protocol):
    """Renders chat messages as text, like a tokenizer's chat template."""

    def __call__(self, messages: list[Message], add_generation_prompt: bool, /) -> str:
        """`add_generation_prompt` ends the text where the assistant turn begins.

        Raises:
            ValueError: one line that says why these messages cannot be rendered.
        """
        ...


class Unusable(ValueError):
    """A problem of a single row, which does not invalidate its file."""


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix of two dialogues, and the rest of each.

    The prefix ends just after its last "\\n\\nAssistant:", so that two responses with
    the same beginning stay complete. Without that marker it ends before the last shared
    white space, never within a word. It is empty if nothing is shared.
    """
    shared = chosen[: _shared_length(chosen, rejected)]
    marker = shared.rfind(ANSWER_MARKER)
    if marker >= 0:
        end = marker + len(ANSWER_MARKER)
    else:
        last_word = _LAST_WORD.search(shared)
        end = last_word.start() if last_word else 0
    return shared[:end], chosen[end:], rejected[end:]


def split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The common prefix of two conversations, and the rest of each.

    Each rest has at least one message, the first from the assistant; otherwise the
    prefix is empty.
    """
    end = min(_shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while end > 0 and not chosen[end]["role"] == rejected[end]["role"] == "assistant":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def messages_in(row: Row, column: str) -> list[Message]:
    """The column's chat messages; raises `ValueError` for anything else."""
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise row.error(
            f"column {shown(column)} is {shown(messages)}, not a list of chat messages"
        )
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise row.error(
                f"column {shown(column)} has the message {shown(message)}; a message "
                'is an object with the strings "role" and "content"'
            )
    return messages


def render_prompt(row: Row, messages: list[Message], render: RenderChat | None) -> str:
    """Renders messages as text that ends where the assistant turn begins.

    Raises:
        Unusable: if `render` rejects them.
    """
    return _rendered(row, messages, True, render)


def render_answer(
    row: Row, messages: list[Message], answer: list[Message], render: RenderChat | None
) -> str:
    """What the chat template adds to the prompt `messages` for `answer`.

    Trailing white space is stripped: templates add a line break after the end-of-turn
    token, and the model should stop at that token.

    Raises:
        Unusable: if `render` rejects the messages.
        ValueError: if the rendered conversation does not start with the rendered
            prompt, as with templates that rewrite earlier turns.
    """
    prompt = render_prompt(row, messages, render)
    whole = _rendered(row, messages + answer, False, render)
    if not whole.startswith(prompt):
        raise row.error(
            f"the chat template changes earlier text when message {len(messages) + 1} "
            f"is added; give prompt and response as text, or use an append-only chat "
            f"template"
        )
    return whole[len(prompt) :].rstrip()


def earlier_answers(
    row: Row, messages: list[Message], render: RenderChat | None
) -> tuple[Span, ...]:
    """The spans of earlier assistant turns in the text of the prompt `messages`.

    Each span runs from the start of the assistant turn through the end-of-turn text,
    without trailing white space. An assistant message that opens the conversation is
    skipped.

    Raises:
        Unusable: if `render` rejects the beginning of the conversation.
        ValueError: if the template changes a turn when later turns are added, so that
            training and generation would see different text.
    """
    prompt = render_prompt(row, messages, render)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = render_prompt(row, messages[:i], render)
        answer = render_answer(row, messages[:i], [message], render)
        if not prompt.startswith(before + answer):
            raise row.error(
                f"the chat template changes message {i + 1}, or earlier text, when "
                'later messages are added; use train_on="last-answer" or an '
                "append-only chat template"
            )
        spans.append((len(before), len(before) + len(answer)))
    return tuple(spans)


def _rendered(
    row: Row,
    messages: list[Message],
    add_generation_prompt: bool,
    render: RenderChat | None,
) -> str:
    if render is None:
        raise row.error(
            "chat messages need render_chat, which renders them as text, such as a "
            "tokenizer's chat template"
        )
    try:
        return render(messages, add_generation_prompt)
    except ValueError as error:
        raise Unusable(str(error)) from None


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: a[:n] != b[:n])

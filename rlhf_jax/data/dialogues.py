"""Where the prompt of a dialogue, text or chat messages, ends and its answer begins."""

import bisect
import re
from collections.abc import Sequence
from typing import Any, Protocol

from rlhf_jax.data.row_files import Row, shown

Message = dict[str, Any]  # {"role": str, "content": str, ...}

ANSWER_MARKER = "\n\nAssistant:"
"""What precedes an answer in the dialogues of Bai et al., 2022, arXiv:2204.05862."""

Span = tuple[int, int]
"""Begin and end of a piece of text, in characters, the end excluded."""

_LAST_WORD = re.compile(r"\s+\S*\Z")


class RenderChat(Protocol):
    """Chat messages as text, in the way of a tokenizer's chat template."""

    def __call__(self, messages: list[Message], add_generation_prompt: bool, /) -> str:
        """`add_generation_prompt` ends the text where the assistant begins to speak.

        Raises:
            ValueError: one line that says why these messages cannot become text.
        """
        ...


class Unusable(ValueError):
    """What is wrong with a row that others of its file need not share."""


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The beginning that two dialogues share, and how each of them goes on.

    The beginning ends just after its last "\\n\\nAssistant:", so that two answers that
    begin alike are kept whole. Without that marker it ends before the last white space
    that both have, never within a word. It is empty where nothing is shared.
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
    """The messages that two conversations share, and how each of them goes on.

    Each goes on with at least one message, the first of them the assistant's; where
    that cannot be, nothing is shared.
    """
    end = min(_shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while end > 0 and not chosen[end]["role"] == rejected[end]["role"] == "assistant":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def messages_in(row: Row, column: str) -> list[Message]:
    """The column's chat messages; raises `ValueError` where it holds something else."""
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
                'is an object with the texts "role" and "content"'
            )
    return messages


def render_prompt(row: Row, messages: list[Message], render: RenderChat | None) -> str:
    """Messages as text that ends where the assistant begins to speak.

    Raises:
        Unusable: where `render` refuses them.
    """
    return _rendered(row, messages, True, render)


def render_answer(
    row: Row, messages: list[Message], answer: list[Message], render: RenderChat | None
) -> str:
    """What the chat template adds to the prompt `messages` for `answer`.

    White space at its end is cut off: templates write a line break after the token
    that ends a turn, and the model should stop at that token.

    Raises:
        Unusable: where `render` refuses the messages.
        ValueError: where the text of the conversation does not begin with the text of
            the prompt, as with templates that rewrite earlier turns.
    """
    prompt = render_prompt(row, messages, render)
    whole = _rendered(row, messages + answer, False, render)
    if not whole.startswith(prompt):
        raise row.error(
            f"the chat template writes what comes before message {len(messages) + 1} "
            "otherwise when that message follows; give prompt and answer as text, or "
            "use a chat template that only appends"
        )
    return whole[len(prompt) :].rstrip()


def earlier_answers(
    row: Row, messages: list[Message], render: RenderChat | None
) -> tuple[Span, ...]:
    """Where in the text of the prompt `messages` the assistant's answers stand.

    Each reaches from where the assistant begins to speak through what the template
    writes to end the turn, white space left out. A message that begins the
    conversation answers nothing and is passed over.

    Raises:
        Unusable: where `render` refuses the beginning of the conversation.
        ValueError: where the template writes a turn otherwise once others follow, so
            that what would be learnt is not what is read later.
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
                f"the chat template writes message {i + 1}, or what comes before it, "
                'otherwise once others follow; take train_on="last-answer", or a chat '
                "template that only appends"
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
            "chat messages need render_chat, which turns them into text, such as the "
            "chat template of a tokenizer"
        )
    try:
        return render(messages, add_generation_prompt)
    except ValueError as error:
        raise Unusable(str(error)) from None


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common from their beginning."""
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect.bisect_left(lengths, True, key=lambda n: a[:n] != b[:n])

"""Renders conversations as text with a tokenizer's chat template."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.files.printable import one_line, printable, shown
from rlhf_jax.files.regular_file import TEMPLATE_BYTES, read_text
from rlhf_jax.models.chat_renderer import render_template

if TYPE_CHECKING:  # slow import; keeps `rlhf-jax --help` fast
    from transformers import PreTrainedTokenizerBase

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_TRIAL = [
    {"role": "user", "content": "What comes after one?"},
    {"role": "assistant", "content": "Two does."},
]


def render_chat(
    tokenizer: "PreTrainedTokenizerBase | None",
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    """Renders a conversation as text with the tokenizer's chat template.

    Without a template: `"\\n\\nHuman: …\\n\\nAssistant: …"`, after the system message
    if the conversation starts with one (the format of Anthropic's HH data). A response
    to such a prompt starts with a space.

    Args:
        tokenizer: with or without a chat template; None: no template. Templates write
            special tokens into the text: encode it with `add_special_tokens=False`.
        messages: each with a `"role"` (`"system"`, `"user"`, `"assistant"`) and its
            `"content"`.
        add_generation_prompt: end with the start of the assistant's turn.

    Raises:
        ValueError: if there are no messages, the default format does not have a role,
            or the template is broken, rejects the conversation, as some do with a
            system message, or needs too much time or memory. One line.

    References:
        Bai et al., 2022, arXiv:2204.05862.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one")
    if tokenizer is None or tokenizer.chat_template is None:
        return _render_default(messages, add_generation_prompt)
    source = tokenizer.get_chat_template()
    if not isinstance(source, str):
        raise ValueError(f"the chat template is {shown(source)}, not text")
    values = {
        **tokenizer.special_tokens_map,
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    answer = render_template(source, values)
    if "broken" in answer:
        raise ValueError(f"the chat template is broken {one_line(answer['broken'])}")
    if "error" in answer:
        roles = printable(", ".join(x["role"] for x in messages), limit=80)
        raise ValueError(
            f"the chat template rejects the roles {roles}: {one_line(answer['error'])}"
        )
    return answer["text"]


def set_chat_template(
    tokenizer: "PreTrainedTokenizerBase", path: str | Path, *, name: str
) -> None:
    """Sets a tokenizer's chat template from a file, after testing it.

    `tokenizer.save_pretrained` saves it.

    Args:
        tokenizer: its template is replaced, if it has one.
        path: a Jinja template in UTF-8, like a checkpoint's `chat_template.jinja`.
        name: the name of the option or file for error messages.

    Raises:
        ValueError: if the file cannot be read, is not a template, or cannot be trained
            with: it drops a message, or changes a user message when the assistant
            message is added. One line.
    """
    named = f"{name}={str(path)!r}"
    try:
        text = read_text(path, most_bytes=TEMPLATE_BYTES)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    tokenizer.chat_template = text
    try:
        prompt = render_chat(tokenizer, _TRIAL[:1], add_generation_prompt=True)
        whole = render_chat(tokenizer, _TRIAL, add_generation_prompt=False)
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from None
    for part, message in ((prompt, _TRIAL[0]), (whole, _TRIAL[1])):
        if message["content"] not in part:
            raise ValueError(
                f"{named}: the template drops the content of the {message['role']} "
                "message; it must render every message's content"
            )
    if not whole.startswith(prompt):
        raise ValueError(
            f"{named}: the prompt changes when the response is added; with "
            "add_generation_prompt the text must continue exactly as the assistant's "
            "turn begins"
        )


def special_token_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """A pattern for the texts of special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {*tokenizer.all_special_tokens, *(x.content for x in added if x.special)}
    longest_first = sorted(tokens - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check_spells_none(
    messages: Iterable[Mapping[str, str]], special: re.Pattern[str]
) -> None:
    """Raises ValueError if a message contains a special token.

    A template puts contents between the tokens that delimit turns; content that
    contains them could end its turn early and start another with any role.

    Args:
        messages: as in `render_chat`.
        special: from `special_token_pattern`.
    """
    for message in messages:
        for field in ("role", "content"):
            found = special.search(message[field])
            if found:
                raise ValueError(
                    f"a chat message contains the special token {found[0]!r}"
                )


def _render_default(
    messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    text = ""
    for i, message in enumerate(messages):
        if i == 0 and message["role"] == "system":
            text = message["content"]
        elif message["role"] in _SPEAKERS:
            text += f"\n\n{_SPEAKERS[message['role']]}: {message['content']}"
        else:
            raise ValueError(
                f"messages[{i}] has role={message['role']!r}; without a chat template, "
                "use 'user' and 'assistant', and 'system' only first"
            )
    return text + ("\n\nAssistant:" if add_generation_prompt else "")

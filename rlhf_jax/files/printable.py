"""Escapes characters that control a terminal or reorder text."""

import json
import re
from typing import Any

# C0 and C1, the bidirectional controls, the line and paragraph separators, and lone
# surrogates, which no encoding can print.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NAMED = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}


def printable(text: str, *, keep: str = "", limit: int | None = None) -> str:
    r"""The text with its control characters escaped, as `\x1b` or `\u202e`.

    What it returns cannot move the cursor, change colors or reverse the order of the
    text that follows. All other text stays as it is.

    Args:
        text: from a file, a model or an error message.
        keep: control characters that stay, such as `"\n\t"`.
        limit: most characters to return; a longer text ends with "…".
    """
    if limit is not None and len(text) > limit:
        text = text[:limit]  # an escape is at least as long as its character
        shown = printable(text, keep=keep)
        return shown[: limit - 1] + "…"
    return _CONTROLS.sub(lambda found: _escape(found[0], keep), text)


def _escape(character: str, keep: str) -> str:
    if character in keep:
        return character
    code = ord(character)
    plain = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return _NAMED.get(character, plain)


def shown(value: Any) -> str:
    """A value from a file on one line of at most 80 characters, for messages.

    In JSON's notation, with control characters escaped.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that JSON has not
        text = repr(value)
    text = printable(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException | str, *, limit: int = 200) -> str:
    """The message of another library's error on one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text, limit=limit)

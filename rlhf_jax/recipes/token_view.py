"""Tokens on a screen: those that are learnt in colour, or between marks without it."""

import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.text import Text

from rlhf_jax.models.tokenizer import token_texts
from rlhf_jax.recipes.language import Language

BEGIN, END = "⟦", "⟧"
LINE_BREAK = "↵"

_READ = "dim"
_SPECIAL = "#b45fcf"
_NOTE = "italic cyan"
# Two shades in turn, so that it is seen where one token ends and the next begins.
_LEARNT = ("black on #a8e6a3", "black on #d4f5c4")
_LEARNT_SPECIAL = "bold #a0007a on #a8e6a3"

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Tokens</title>
<style>
{stylesheet}
body {{ color: {foreground}; background: {background}; margin: 2em; }}
pre {{ font: 14px/1.7 Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60em; }}
</style>
<pre>{code}</pre>
</html>
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One sequence of a data set."""

    title: str
    tokens: np.ndarray  # [L] int32
    learnt: np.ndarray  # [L] bool
    note: str = ""  # what happens at its end


def token_text(row: TokenRow, language: Language, *, colour: bool) -> Text:
    """A sequence, what is learnt in colour or, without colour, between marks."""
    special = language.special_ids
    texts = token_texts(language.tokenizer, row.tokens.tolist())
    shown = Text()
    was_learnt = False
    pieces = zip(row.tokens.tolist(), texts, row.learnt.tolist(), strict=True)
    for number, (token, text, learnt) in enumerate(pieces):
        if learnt != was_learnt and not colour:
            shown.append(BEGIN if learnt else END)
        was_learnt = learnt
        style = ""
        if colour:
            style = _style(learnt, is_special=token in special, number=number)
        for part in _parts(text):
            shown.append(part, style=style)
    if was_learnt and not colour:
        shown.append(END)
    return shown


def legend(learnt: str, *, colour: bool) -> Text:
    """What colours and marks mean.

    Args:
        learnt: what is in colour, such as "learnt".
        colour: whether there are colours.
    """
    if not colour:
        return Text(f"{BEGIN}{learnt}{END}   read only   {LINE_BREAK} line break")
    return Text.assemble(
        (f" {learnt}, ", _LEARNT[0]),
        ("token ", _LEARNT[1]),
        ("by token ", _LEARNT[0]),
        ("<special>", _LEARNT_SPECIAL),
        "   ",
        ("read only", _READ),
        "  ",
        ("<special>", _SPECIAL),
        f"   {LINE_BREAK} line break",
    )


def show(
    console: Console, rows: list[TokenRow], language: Language, *, learnt: str
) -> None:
    """Prints sequences, each with a title, after the legend."""
    colour = console.color_system is not None and not console.no_color
    _print(console, legend(learnt, colour=colour))
    for row in rows:
        counts = f"{len(row.tokens)} tokens"
        if row.learnt.any():
            counts += f", {int(row.learnt.sum())} {learnt}"
        _print(console, Text(f"\n── {row.title} · {counts}", style="bold"))
        text = token_text(row, language, colour=colour)
        if row.note:
            text.append("" if text.plain.endswith("\n") else "\n")
            text.append(f"▸ {row.note}", style=_NOTE if colour else "")
        _print(console, text)


def page(
    rows: list[TokenRow], language: Language, summary: list[str], *, learnt: str
) -> str:
    """What `show` prints, and the counts, as an HTML page."""
    console = Console(
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )
    show(console, rows, language, learnt=learnt)
    for line in ["", *summary]:
        _print(console, Text(line))
    return console.export_html(code_format=_PAGE, inline_styles=False)


def _style(learnt: bool, *, is_special: bool, number: int) -> str:
    if is_special:
        return _LEARNT_SPECIAL if learnt else _SPECIAL
    return _LEARNT[number % 2] if learnt else _READ


def _parts(text: str) -> Iterator[str]:
    """The lines of a text; breaks are seen, and stand outside of coloured cells."""
    *lines, last = text.split("\n")
    for line in lines:
        yield line + LINE_BREAK
        yield "\n"
    if last:
        yield last


def _print(console: Console, text: Text) -> None:
    # Lines are broken by who shows them, so that a log has the text as it is.
    console.print(text, markup=False, highlight=False, soft_wrap=True)

"""Shows the tokens of a dataset as a stage trains on them."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from rlhf_jax.config.inspection import ShowDataConfig
from rlhf_jax.data.encoding import Encoded
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.files.printable import printable
from rlhf_jax.models.tokenizer import token_texts
from rlhf_jax.recipes import prompt_batches
from rlhf_jax.recipes import reward_model as feedback
from rlhf_jax.recipes import sft as sft_data
from rlhf_jax.recipes.splits import read_reported
from rlhf_jax.run.progress import heading, say
from rlhf_jax.run.report import CONTENT_POLICY

BEGIN, END = "⟦", "⟧"


LINE_BREAK = "↵"


_READ = "dim"


_SPECIAL = "#b45fcf"


_NOTE = "italic cyan"


# Two alternating shades, to separate tokens.
_LEARNT = ("black on #a8e6a3", "black on #d4f5c4")


_LEARNT_SPECIAL = "bold #a0007a on #a8e6a3"


_HEAD = f"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
"""
_PAGE = (
    _HEAD
    + """\
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
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One sequence of a dataset."""

    title: str
    tokens: np.ndarray  # [L] int32
    learnt: np.ndarray  # [L] bool
    note: str = ""  # shown at its end


def token_text(row: TokenRow, tokenization: Tokenization, *, colour: bool) -> Text:
    """A sequence, with tokens that are trained on in color or between marks."""
    special = tokenization.special_ids
    texts = token_texts(tokenization.tokenizer, row.tokens.tolist())
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
    """The legend of colors or marks.

    Args:
        learnt: meaning of the highlight, such as "trained on".
        colour: whether to use colors.
    """
    if not colour:
        return Text(f"{BEGIN}{learnt}{END}   context   {LINE_BREAK} line break")
    return Text.assemble(
        (f" {learnt}, ", _LEARNT[0]),
        ("token ", _LEARNT[1]),
        ("by token ", _LEARNT[0]),
        ("<special>", _LEARNT_SPECIAL),
        "   ",
        ("context", _READ),
        "  ",
        ("<special>", _SPECIAL),
        f"   {LINE_BREAK} line break",
    )


def show(
    console: Console, rows: list[TokenRow], tokenization: Tokenization, *, learnt: str
) -> None:
    """Prints the legend, then sequences with titles."""
    colour = console.color_system is not None and not console.no_color
    _print(console, legend(learnt, colour=colour))
    for row in rows:
        counts = f"{len(row.tokens)} tokens"
        if row.learnt.any():
            counts += f", {int(row.learnt.sum())} {learnt}"
        _print(console, Text(f"\n── {printable(row.title)} · {counts}", style="bold"))
        text = token_text(row, tokenization, colour=colour)
        if row.note:
            text.append("" if text.plain.endswith("\n") else "\n")
            text.append(f"▸ {printable(row.note)}", style=_NOTE if colour else "")
        _print(console, text)


def page(
    rows: list[TokenRow], tokenization: Tokenization, summary: list[str], *, learnt: str
) -> str:
    """The output of `show`, with the counts, as an HTML page."""
    console = Console(
        record=True,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
    )
    show(console, rows, tokenization, learnt=learnt)
    for line in ["", *summary]:
        _print(console, Text(printable(line)))
    return console.export_html(code_format=_PAGE, inline_styles=False)


def _style(learnt: bool, *, is_special: bool, number: int) -> str:
    if is_special:
        return _LEARNT_SPECIAL if learnt else _SPECIAL
    return _LEARNT[number % 2] if learnt else _READ


def _parts(text: str) -> Iterator[str]:
    """The lines of a text; line breaks are visible, and outside of colored spans.

    Control characters are escaped, since a terminal would obey them.
    """
    *lines, last = text.split("\n")
    for line in lines:
        yield printable(line, keep="\t") + LINE_BREAK
        yield "\n"
    if last:
        yield printable(last, keep="\t")


def _print(console: Console, text: Text) -> None:
    # No wrapping, so that a log has the text unchanged.
    console.print(text, markup=False, highlight=False, soft_wrap=True)


_NOTES = {
    "sft": "",
    "reward": "the score is read at the last token",
    "prompts": "the policy continues from here",
}
_LEARNT_BY_TASK = {"sft": "trained on", "reward": "scored", "prompts": "trained on"}
_NAMES = {"sft": "sequences", "reward": "pairs", "prompts": "prompts"}


def run(config: ShowDataConfig) -> list[str]:
    """Prints examples and counts; returns the lines of the counts.

    Raises:
        ValueError: one line, for invalid input.
    """
    config.validate()
    if config.html is not None:
        Path(config.html).parent.mkdir(parents=True, exist_ok=True)
    tokenization, encoded, rows_of = _READERS[config.task](config)
    shown = encoded.rows[: config.limit]
    rows = []
    for number, item in enumerate(shown, start=1):
        rows += rows_of(item, f"{number} of {len(encoded.rows)}")
    learnt = _LEARNT_BY_TASK[config.task]
    summary = _summary(config, encoded, rows_of)
    show(Console(), rows, tokenization, learnt=learnt)
    say("")
    for line in summary:
        heading(line)
    if config.html is not None:
        text = page(rows, tokenization, summary, learnt=learnt)
        write_atomic(Path(config.html), text)
        heading(f"written to {config.html}")
    return summary


RowsOf = Callable[[Any, str], list[TokenRow]]
Read = tuple[Tokenization, Encoded[Any], RowsOf]


def _read_sft(config: ShowDataConfig) -> Read:
    stage = config.sft_config()
    tokenization = sft_data.load_tokenization(stage)
    assert tokenization is not None  # the configuration has a model
    examples = sft_data.read_data(stage, stage.data, tokenization)

    def rows_of(row: Any, title: str) -> list[TokenRow]:
        learnt = row.learnt.copy()
        learnt[0] = False  # it has no context
        return [TokenRow(title=title, tokens=row.tokens, learnt=learnt)]

    return tokenization, sft_data.encode_data(stage, tokenization, examples), rows_of


def _read_reward(config: ShowDataConfig) -> Read:
    stage = config.reward_config()
    tokenization = Tokenization.load(stage.model)
    read = feedback.pair_reader(stage, tokenization)
    pairs = read_reported(stage.data, read, quiet=False)

    def rows_of(row: Any, title: str) -> list[TokenRow]:
        sides = {"chosen": row.chosen, "rejected": row.rejected}
        return [
            TokenRow(
                title=f"{title}, {name}",
                tokens=tokens,
                learnt=np.arange(len(tokens)) >= row.prompt_length,
                note=_NOTES["reward"],
            )
            for name, tokens in sides.items()
        ]

    return tokenization, feedback.encode_feedback(stage, tokenization, pairs), rows_of


def _read_prompts(config: ShowDataConfig) -> Read:
    stage = config.policy_config()
    tokenization = Tokenization.load(stage.policy)
    read = prompt_batches.prompt_reader(stage, tokenization)
    prompts = read_reported(stage.data, read, quiet=False)
    encoded, _ = prompt_batches.encode_rows(
        prompts,
        tokenization=tokenization,
        max_prompt_tokens=stage.max_prompt_tokens,
        overlong=stage.overlong,
    )

    def rows_of(row: Any, title: str) -> list[TokenRow]:
        nothing = np.zeros(len(row), bool)
        note = _NOTES["prompts"]
        return [TokenRow(title=title, tokens=row, learnt=nothing, note=note)]

    return tokenization, encoded, rows_of


_READERS: dict[str, Callable[[ShowDataConfig], Read]] = {
    "sft": _read_sft,
    "reward": _read_reward,
    "prompts": _read_prompts,
}


def _summary(
    config: ShowDataConfig, encoded: Encoded[Any], rows_of: RowsOf
) -> list[str]:
    sequences = [row for item in encoded.rows for row in rows_of(item, "")]
    tokens = sum(len(row.tokens) for row in sequences)
    learnt = sum(int(row.learnt.sum()) for row in sequences)
    longest = max(len(row.tokens) for row in sequences)
    share = f", {learnt} {_LEARNT_BY_TASK[config.task]} ({learnt / tokens:.1%})"
    return [
        f"{len(encoded.rows)} {_NAMES[config.task]} of at most {longest} tokens; "
        f"{sft_data.too_long(encoded)}",
        f"{tokens} tokens" + (share if config.task != "prompts" else ""),
    ]

"""What reaches a terminal cannot control it."""

import pytest

from rlhf_jax.files.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]52;c;cm0=\x07", r"\x1b]52;c;cm0=\x07"),  # writes the clipboard
        ("a\x9b2J", r"a\x9b2J"),  # C1: the same without ESC
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x00\x7f", r"\x00\x7f"),
        ("\u202eevil\u202c", r"\u202eevil\u202c"),
        ("\u2066\u2069\u200e\u200f\u061c", r"\u2066\u2069\u200e\u200f\u061c"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ud800", r"\ud800"),
        ("naïve — ∀ 漢字 🙂 \u200d é", "naïve — ∀ 漢字 🙂 \u200d é"),
        ("", ""),
    ],
)
def test_controls_are_escaped_and_nothing_else(text, shown):
    assert printable(text) == shown


def test_told_characters_stay():
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_a_long_text_is_cut():
    assert printable("x" * 100, limit=5) == "xxxx…"
    assert printable("xxxxx", limit=5) == "xxxxx"
    assert printable("\x1b" * 100, limit=6) == r"\x1b\…"

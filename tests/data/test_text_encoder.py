"""Where answers begin and end among the tokens of a text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.text_encoder import TextEncoder

BOS, EOS, END, SPACE, PAIR = 1, 2, 3, 4, 5


def ids_of(text):
    """One id per letter; two stars are one token, "$" is EOS and "%" another end."""
    special = {"^": BOS, "$": EOS, "%": END, "_": SPACE, "**": PAIR}
    return [special.get(part) or ord(part) for part in re.findall(r"\*\*|.", text)]


def plain(texts, /, *, add_special_tokens):
    assert add_special_tokens is False
    return {"input_ids": [ids_of(text) for text in texts]}


def begun(texts, /, *, add_special_tokens):
    """Puts a space before every text, as SentencePiece does."""
    return {"input_ids": [ids_of(f"_{text}") for text in texts]}


def stripping(texts, /, *, add_special_tokens):
    """Takes stars after an end along with it."""
    return {"input_ids": [ids_of(re.sub(r"%\*+", "%", text)) for text in texts]}


def encoder(tokenizer=plain, bos_id=None, end_ids=frozenset()):
    return TextEncoder(tokenizer=tokenizer, eos_id=EOS, bos_id=bos_id, end_ids=end_ids)


def answer_of(prompt, answer, **options):
    one = encoder(**options)
    (found,) = one.answers([answer], [prompt], one.prompts([prompt]))
    return found


@pytest.mark.parametrize(
    ("answer", "ends", "want"),
    [
        ("ab", {END}, "ab$"),  # no end: the tokenizer's EOS
        ("ab$", {END}, "ab$"),
        ("ab%", {END}, "ab%"),
        ("ab%", set(), "ab%$"),
        ("a%b", {END}, "a%b$"),  # an end in the middle ends nothing
        ("", {END}, "$"),
    ],
)
@pytest.mark.parametrize("prompt", ["", "q"])
def test_one_end(prompt, answer, ends, want):
    assert answer_of(prompt, answer, end_ids=frozenset(ends)) == ids_of(want)


def test_answers_follow_their_prompts_without_a_space_between():
    assert answer_of("q", "ab", tokenizer=begun) == ids_of("ab$")
    assert answer_of("", "ab", tokenizer=begun) == ids_of("_ab$")


def test_answers_whose_beginning_a_prompt_swallows():
    assert answer_of("q%", "*ab", tokenizer=stripping) == ids_of("ab$")


def test_tokens_of_a_prompt_do_not_depend_on_its_answer():
    # Together "q*" and "*a" would be q, **, a.
    assert encoder().prompts(["q*"]) == [ids_of("q") + ids_of("*")]
    assert answer_of("q*", "*a") == ids_of("*") + ids_of("a$")


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_prompts_begin_with_one_bos(bos_id):
    one = encoder(bos_id=bos_id)
    added = [] if bos_id is None else [BOS]
    assert one.prompts(["ab", "^ab"]) == [added + ids_of("ab"), ids_of("^ab")]
    assert one.answers(["c"], ["^ab"], [ids_of("^ab")]) == [ids_of("c$")]


def spans_of(text, *, tokenizer=plain, bos_id=None):
    """Tokens of a text, with ( ) around its spans; with them around those found."""
    spans = [m.span(1) for m in re.finditer(r"\((.*?)\)", text)]
    spans = [(a - 2 * i - 1, b - 2 * i - 1) for i, (a, b) in enumerate(spans)]
    bare = text.replace("(", "").replace(")", "")
    one = encoder(tokenizer, bos_id)
    rows = one.prompts([bare])
    (found,) = one.token_spans([bare], rows, [spans])
    return [rows[0][a:b] for a, b in found]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("ab(cd)e(f)gh", ["cd", "f"]),
        ("ab", []),
        ("ab(cd)", ["cd"]),
        ("a*(*b)c", ["b"]),  # the first star belongs to the header
        ("a(b*)*c", ["b"]),  # the last one to what follows
        ("a(b**)*c", ["b**"]),
        ("a*(*)*b", [""]),  # read from the left they are ** and *
        ("a*(*b)c(d)*(*)e", ["b", "d", ""]),
    ],
)
@pytest.mark.parametrize("bos_id", [None, BOS])
def test_spans_have_whole_tokens(text, want, bos_id):
    found = spans_of(text, bos_id=bos_id)
    assert found == [ids_of(part) for part in want]


def test_spans_where_every_text_begins_with_a_space():
    assert spans_of("ab(cd)e(f)gh", tokenizer=begun) == [ids_of("cd"), ids_of("f")]


def test_spans_before_white_space_that_their_end_swallows():
    found = spans_of("ab(c%)**de(f%)**gh", tokenizer=stripping)
    assert found == [ids_of("c%"), ids_of("f%")]


@given(st.lists(st.text("ab*", max_size=4), min_size=1, max_size=7), st.booleans())
def test_spans_never_have_tokens_from_outside(parts, bos):
    """Every second part is a span; no token is shared between two parts."""
    text = "".join(f"({p})" if i % 2 else p for i, p in enumerate(parts))
    inside = [p for i, p in enumerate(parts) if i % 2]
    found = spans_of(text, bos_id=BOS if bos else None)
    assert len(found) == len(inside)
    for tokens, part in zip(found, inside, strict=True):
        letters = [chr(i) if i != PAIR else "**" for i in tokens]
        assert "".join(letters) in part


def test_nothing_to_encode():
    with pytest.raises(ValueError, match="no rows"):
        encoder().prompts([])

"""Token ids, limits and padded widths, with one token per character."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.comparisons import RankedResponses
from rlhf_jax.data.encoding import (
    encode_examples,
    encode_pairs,
    encode_prompts,
    encode_rankings,
)
from rlhf_jax.data.text_data import Example, PreferencePair
from rlhf_jax.data.text_encoder import TextEncoder

EOS, BOS = 1, 2


def characters(texts, /, *, add_special_tokens):
    """Encodes a as 97, b as 98 …, and "$" as EOS, as a chat template may write it."""
    assert add_special_tokens is False
    ids = [[EOS if c == "$" else ord(c) for c in text] for text in texts]
    return {"input_ids": ids}


def encoder(bos_id=None):
    return TextEncoder(tokenizer=characters, eos_id=EOS, bos_id=bos_id)


def text_of(tokens):
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    return "".join({EOS: "$", BOS: "^"}.get(int(t), chr(t)) for t in tokens)


def prompts_of(prompts, limit, *, bos_id=None, **options):
    encoded = encode_prompts(
        prompts, encoder(bos_id), max_prompt_tokens=limit, **options
    )
    return encoded, [text_of(row) for row in encoded.rows]


def examples_of(examples, limit, *, bos_id=None, **options):
    encoded = encode_examples(
        [Example(*example) for example in examples],
        encoder(bos_id),
        max_tokens=limit,
        **options,
    )
    return encoded, [shown(row) for row in encoded.rows]


def shown(row):
    """An example, with what is not learnt in brackets; "[]" where all is."""
    text = ""
    for learnt, run in itertools.groupby(
        zip(row.tokens, row.learnt, strict=True), key=lambda pair: pair[1]
    ):
        part = text_of(np.array([token for token, _ in run], np.int32))
        text += part if learnt else f"[{part}]"
    return text if text.startswith("[") else f"[]{text}"


def pairs_of(pairs, limit, **options):
    encoded = encode_pairs(
        [PreferencePair(*pair) for pair in pairs],
        encoder(),
        max_tokens=limit,
        **options,
    )
    rows = encoded.rows
    return encoded, [(text_of(row.chosen), text_of(row.rejected)) for row in rows]


# Prompts.


def test_prompts_within_the_limit():
    encoded, texts = prompts_of(["abc", "a", "abcd"], 4)
    assert texts == ["abc", "a", "abcd"] and encoded.sources == [0, 1, 2]
    assert (encoded.dropped, encoded.truncated) == (0, 0)


def test_prompts_dropped():
    encoded, texts = prompts_of(["abcde", "a", "abcdef", "abcd"], 4)
    assert texts == ["a", "abcd"] and encoded.sources == [1, 3]
    assert (encoded.dropped, encoded.truncated) == (2, 0)


def test_prompts_truncated_keep_their_end():
    encoded, texts = prompts_of(["abcde", "a"], 4, overlong="truncate")
    assert texts == ["bcde", "a"] and encoded.sources == [0, 1]
    assert (encoded.dropped, encoded.truncated) == (0, 1)
    assert prompts_of(["abc"], 1, overlong="truncate")[1] == ["c"]


def test_prompts_refused():
    with pytest.raises(ValueError) as caught:
        prompts_of(["abcde", "a", "abcdefg"], 4, overlong="fail")
    message = str(caught.value)
    assert "max_prompt_tokens=4: 2 of 3 prompts are longer" in message
    assert "the longest has 7 tokens" in message
    assert '"drop" or "truncate"' in message and "\n" not in message
    assert prompts_of(["abcd"], 4, overlong="fail")[1] == ["abcd"]


def test_bos_comes_first_once_and_stays():
    encoded, texts = prompts_of(["abc", "\x02ab"], 4, bos_id=BOS)
    assert texts == ["^abc", "^ab"] and encoded.truncated == 0
    encoded, texts = prompts_of(["abcd"], 4, bos_id=BOS, overlong="truncate")
    assert texts == ["^bcd"] and encoded.truncated == 1
    with pytest.raises(ValueError, match="none is left"):  # no room beside BOS
        prompts_of(["abcd"], 1, bos_id=BOS, overlong="truncate")


def test_prompt_without_tokens():
    with pytest.raises(ValueError, match=r'prompt 1, "", has no tokens'):
        prompts_of(["a", ""], 4)
    assert prompts_of(["a", ""], 4, bos_id=BOS)[1] == ["^a", "^"]


def test_nothing_to_encode_and_nothing_left():
    with pytest.raises(ValueError, match="no rows"):
        prompts_of([], 4)
    with pytest.raises(ValueError, match=r"2 of 2 prompts .* none is left"):
        prompts_of(["abcde", "abcdef"], 4)


def test_limits_and_choices_are_checked():
    with pytest.raises(ValueError, match="max_prompt_tokens=0: at least 1"):
        prompts_of(["a"], 0)
    with pytest.raises(ValueError, match="max_tokens=1: at least 2"):
        examples_of([("a", "b")], 1)
    with pytest.raises(ValueError, match='overlong="cut": give "drop", "truncate"'):
        prompts_of(["a"], 4, overlong="cut")


@pytest.mark.parametrize(
    ("length", "limit", "width"),
    [(1, 100, 16), (16, 100, 16), (17, 100, 32), (99, 100, 100), (100, 100, 100)],
)
def test_width_is_a_multiple_of_16_within_the_limit(length, limit, width):
    assert prompts_of(["a", "b" * length], limit)[0].width == width


def test_width_counts_what_is_kept():
    assert prompts_of(["a" * 90, "b" * 20], 40)[0].width == 32
    assert examples_of([("p", "a" * 14)], 100)[0].width == 16  # 1 + 14 + EOS
    assert examples_of([("p", "a" * 15)], 100)[0].width == 32
    assert pairs_of([("p", "a", "b" * 15)], 100)[0].width == 32
    assert pairs_of([("p", "a" * 15, "b")], 100)[0].width == 32


# Examples.


def test_examples_end_with_one_eos():
    encoded, texts = examples_of([("ab", "cd"), ("a", "b$")], 8)
    assert texts == ["[ab]cd$", "[a]b$"] and encoded.sources == [0, 1]


def test_bos_belongs_to_the_prompt():
    assert examples_of([("ab", "cd"), ("", "ef")], 8, bos_id=BOS)[1] == [
        "[^ab]cd$",
        "[^]ef$",
    ]


def test_examples_too_long():
    examples = [("abcd", "ef"), ("abc", "ef"), ("a", "bcdefg"), ("ab", "cdef")]
    encoded, texts = examples_of(examples, 6)  # lengths 7, 6, 8, 7
    assert texts == ["[abc]ef$"] and encoded.sources == [1]
    assert (encoded.dropped, encoded.truncated) == (3, 0)

    # The completions "bcdefg" + EOS leave no room for a token of the prompt.
    encoded, texts = examples_of(examples, 6, overlong="truncate")
    assert texts == ["[bcd]ef$", "[abc]ef$", "[b]cdef$"]
    assert encoded.sources == [0, 1, 3]
    assert (encoded.dropped, encoded.truncated) == (1, 2)

    encoded, texts = examples_of(examples, 6, overlong="truncate", bos_id=BOS)
    assert texts == ["[^cd]ef$", "[^bc]ef$"] and encoded.sources == [0, 1]

    with pytest.raises(ValueError, match=r"max_tokens=6: 3 of 4 examples .* 8 tokens"):
        examples_of(examples, 6, overlong="fail")


@pytest.mark.parametrize("overlong", ["drop", "truncate", "fail"])
def test_plain_text_is_cut_into_windows(overlong):
    encoded, texts = examples_of(
        [("", "abcdefgh"), ("", "xyz"), ("p", "c")], 4, overlong=overlong
    )
    # 9 tokens with EOS: 4, then 3 more at a time after one of context.
    assert texts == ["[]abcd", "[d]efg", "[g]h$", "[]xyz$", "[p]c$"]
    assert encoded.sources == [0, 0, 0, 1, 2]
    assert (encoded.dropped, encoded.truncated) == (0, 0)


def test_plain_text_that_fills_its_windows():
    assert examples_of([("", "abcdef")], 4)[1] == ["[]abcd", "[d]ef$"]
    assert examples_of([("", "abc")], 2)[1] == ["[]ab", "[b]c", "[c]$"]
    assert examples_of([("", "abcdef")], 4, bos_id=BOS)[1] == [
        "[^]abc",
        "[c]def",
        "[f]$",
    ]


@given(st.text("abc", min_size=1), st.integers(2, 9), st.booleans())
def test_windows_teach_every_token_once(text, limit, bos):
    encoded, shown = examples_of([("", text)], limit, bos_id=BOS if bos else None)
    assert all(2 <= len(row.tokens) <= limit for row in encoded.rows)
    assert "".join(re.sub(r"\[.*\]", "", window) for window in shown) == text + "$"


# Pairs.


def test_pairs():
    encoded, texts = pairs_of([("ab", "c", "def"), ("a", "", "b$")], 6)
    assert texts == [("abc$", "abdef$"), ("a$", "ab$")] and encoded.sources == [0, 1]


def test_pairs_too_long():
    pairs = [("abcd", "e", "fg"), ("abcd", "efghi", "f"), ("a", "b", "c")]
    encoded, texts = pairs_of(pairs, 6)  # 7 tokens, 10 tokens, 3 tokens
    assert texts == [("ab$", "ac$")] and encoded.sources == [2]
    assert (encoded.dropped, encoded.truncated) == (2, 0)

    # Both sides keep the same prompt; "efghi" + EOS leaves no room for one.
    encoded, texts = pairs_of(pairs, 6, overlong="truncate")
    assert texts == [("bcde$", "bcdfg$"), ("ab$", "ac$")]
    assert encoded.sources == [0, 2]
    assert (encoded.dropped, encoded.truncated) == (1, 1)

    with pytest.raises(ValueError, match=r"max_tokens=6: 2 of 3 pairs .* 10 tokens"):
        pairs_of(pairs, 6, overlong="fail")


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_rankings_are_as_long_as_their_longest_answer(overlong):
    rankings = [
        RankedResponses(prompt="abc", answers=("d", "ef", ""), grades=(2.0, 1.0, 1.0)),
        RankedResponses(prompt="abc", answers=("d", "efg"), grades=(1.0, 0.0)),
        RankedResponses(prompt="a", answers=("b$", "c"), grades=(3.0, 0.0)),
        RankedResponses(prompt="a", answers=("b", "cdefgh"), grades=(1.0, 0.0)),
    ]
    encoded = encode_rankings(rankings, encoder(), max_tokens=6, overlong=overlong)
    kept = overlong == "truncate"
    texts = [[text_of(answer) for answer in row.answers] for row in encoded.rows]
    want = [["abcd$", "abcef$", "abc$"], ["bcd$", "bcefg$"], ["ab$", "ac$"]]
    assert texts == [want[0], *([want[1]] if kept else []), want[2]]
    assert encoded.sources == ([0, 1, 2] if kept else [0, 2])
    assert encoded.rows[0].grades == (2.0, 1.0, 1.0)
    assert (encoded.dropped, encoded.truncated) == ((1, 1) if kept else (2, 0))


def test_margins_stay_with_their_pairs():
    pairs = [
        PreferencePair("abcdef", "g", "h", margin=0.5),
        PreferencePair("a", "b", "c", margin=2),
    ]
    encoded = encode_pairs(pairs, encoder(), max_tokens=5)
    assert [row.margin for row in encoded.rows] == [2]


def test_a_hugging_face_tokenizer_fits():
    import tokenizers
    import transformers

    ids = {"<eos>": 0, "<unk>": 1, "one": 2, "two": 3, "three": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", unk_token="<unk>"
    )
    words = TextEncoder(tokenizer=tokenizer, eos_id=0)
    encoded = encode_examples([Example("one two", " three")], words, max_tokens=8)
    assert encoded.rows[0].tokens.tolist() == [2, 3, 4, 0]
    assert encode_prompts(["two"], words, max_prompt_tokens=8).rows[0].tolist() == [3]

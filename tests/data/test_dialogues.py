"""Where a dialogue is split into prompt and answers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.dialogues import split_conversations, split_dialogues


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why? yes", "Q: why? no", "Q: why?"),
        ("say apple", "say apricot", "say"),  # not within the word
        ("a b c", "a b", "a"),  # one ends where the other goes on
        ("a\n\nb", "a\n\nc", "a"),  # white space stays in one piece
        ("apple", "apricot", ""),
        ("x", "y", ""),
        ("\n\nAssistant: a\n\nAssistant: b", "\n\nAssistant: c", "\n\nAssistant:"),
        ("\n\nAssistant:", "\n\nAssistant: c", "\n\nAssistant:"),
        ("h\n\nAssista", "h\n\nAssistant: c", "h"),
    ],
)
def test_split_dialogues_by_hand(chosen, rejected, prompt):
    split = split_dialogues(chosen, rejected)
    assert split == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


@given(*[st.text("ab \n") for _ in range(3)])
def test_split_dialogues_loses_nothing_and_shares_all_it_can(shared, a, b):
    chosen, rejected = shared + a, shared + b
    prompt, *answers = split_dialogues(chosen, rejected)
    assert [prompt + answer for answer in answers] == [chosen, rejected]
    assert all(answer == "" or not prompt or answer[0].isspace() for answer in answers)
    # Had they another whole word in common, it would belong to the prompt.
    words = [re.match(r"\s*\S+\s", answer) for answer in answers]
    assert not all(words) or words[0][0] != words[1][0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ("ua", "ua", 1),  # equal: the last answer is still an answer
        ("uaua", "ua", 1),  # one is the beginning of the other
        ("uauA", "uauB", 3),
        ("uaUa", "uaVa", 1),  # the questions differ: the answer before them counts
        ("uU", "uV", 0),  # nobody answers
        ("a", "A", 0),  # nothing comes before the answers
    ],
)
def test_split_conversations_by_hand(chosen, rejected, shared):
    def conversation(letters):
        return [(user if x.lower() in "uv" else assistant)(x) for x in letters]

    chosen, rejected = conversation(chosen), conversation(rejected)
    split = split_conversations(chosen, rejected)
    assert split == (chosen[:shared], chosen[shared:], rejected[shared:])

"""Corrupts reviews the way a policy in training does, so that reward models see it."""

from collections.abc import Callable

import numpy as np

from rlhf_jax.tasks.review_words import (
    ASPECTS,
    INTENSIFIERS,
    KINDS,
    NAME_NOUNS,
    OPINIONS,
)
from rlhf_jax.tasks.review_writer import write_review

# (rng, kind, review) → the corrupted review, or other text
_Damage = Callable[[np.random.Generator, str, str], str]

_PRAISE = tuple(word for word, opinion in OPINIONS.items() if opinion.grade >= 2)
_ADJECTIVES = tuple(OPINIONS)
_WORDS = (*ASPECTS, *OPINIONS, *INTENSIFIERS, *NAME_NOUNS, "the", "was", "i", "it")


def spoil(rng: np.random.Generator, kind: str, review: str) -> str:
    """Applies one of fourteen corruptions to a review.

    Words shuffled, dropped, doubled or replaced; praise words instead of it or at its
    end; truncated; no verdict, or only a verdict; a sentence twice, about another kind
    of product, or spliced with the next; one opinion word throughout; no end.

    Args:
        rng: random generator; it is advanced.
        kind: the kind of product, a key of `KINDS`.
        review: sentences after a leading space, as from `write_review`.

    Returns:
        Text after a leading space. Usually, but not always, with lower true reward.
    """
    return _DAMAGES[rng.integers(len(_DAMAGES))](rng, kind, review)


def _sentences(review: str) -> list[str]:
    """Each with its leading space and full stop."""
    return [f"{part}." for part in review.split(".") if part.strip()]


def _heap(rng: np.random.Generator) -> str:
    """Praise words without a sentence."""
    length = rng.integers(3, 8)
    if rng.random() < 0.5:
        words = [rng.choice(_PRAISE)] * length
    else:
        words = list(rng.choice(_PRAISE, length))
    end = "." if rng.random() < 0.7 else ""
    between = rng.choice([" ", ", ", ". ", " and "], p=[0.55, 0.15, 0.2, 0.1])
    return f" {between.join(words)}{end}"


def _only_praise(rng, kind, review):
    return _heap(rng)


def _praise_at_the_end(rng, kind, review):
    sentences = _sentences(review)
    return "".join(sentences[: rng.integers(1, len(sentences) + 1)]) + _heap(rng)


def _cut_off(rng, kind, review):
    words = review.split(" ")  # the first is empty: the leading space
    return " ".join(words[: rng.integers(2, len(words))]).rstrip(".")


def _without_verdict(rng, kind, review):
    return "".join(_sentences(review)[:-1])


def _only_verdict(rng, kind, review):
    return _sentences(review)[-1]


def _sentence_twice(rng, kind, review):
    sentences = _sentences(review)
    again = sentences[rng.integers(len(sentences))]
    sentences.insert(rng.integers(len(sentences) + 1), again)
    return "".join(sentences)


def _foreign_sentence(rng, kind, review):
    sentences = _sentences(review)
    others = [other for other in KINDS if other != kind]
    foreign = _sentences(write_review(rng, rng.choice(others)))
    at = rng.integers(len(sentences))
    sentences[at] = foreign[min(at, len(foreign) - 1)]
    return "".join(sentences)


def _spliced(rng, kind, review):
    sentences = _sentences(review)
    at = rng.integers(len(sentences) - 1)
    first, second = sentences[at].split(), sentences[at + 1].split()
    joined = first[: rng.integers(1, len(first))] + second[rng.integers(len(second)) :]
    sentences[at : at + 2] = [" " + " ".join(joined)]
    return "".join(sentences)


def _one_opinion_word(rng, kind, review):
    mood = np.mean([OPINIONS[w].grade for w in _opinion_words(review)] or [1])
    suited = [w for w in _ADJECTIVES if OPINIONS[w].grade * mood >= 0]
    word = rng.choice(suited)
    return _map_words(review, lambda w: word if w in OPINIONS else w)


def _rambling(rng, kind, review):
    return review + "".join(_sentences(write_review(rng, kind))[:2])


def _opinion_words(review: str) -> list[str]:
    return [word for word in review.replace(".", "").split() if word in OPINIONS]


def _map_words(review: str, change: Callable[[str], str]) -> str:
    """Applies a change to each word; punctuation stays in place."""
    words = []
    for token in review.split():
        word = token.rstrip(".,")
        words.append(change(word) + token[len(word) :])
    return " " + " ".join(words)


def _edit_words(
    edit: Callable[[np.random.Generator, list[str]], None],
) -> _Damage:
    """Makes a corruption from an edit to the list of words."""

    def damage(rng, kind, review):
        words = review.split()
        edit(rng, words)
        return " " + " ".join(words)

    return damage


@_edit_words
def _shuffled(rng, words):
    start = rng.integers(len(words) - 2)
    end = rng.integers(start + 3, len(words) + 1)
    words[start:end] = list(rng.permutation(words[start:end]))


@_edit_words
def _words_dropped(rng, words):
    for _ in range(rng.integers(1, 4)):
        del words[rng.integers(len(words))]


@_edit_words
def _word_doubled(rng, words):
    at = rng.integers(len(words))
    words[at:at] = [words[at].rstrip(".,")] * rng.integers(1, 5)


@_edit_words
def _words_replaced(rng, words):
    for _ in range(rng.integers(1, 4)):
        words[rng.integers(len(words))] = str(rng.choice(_WORDS))


_DAMAGES: tuple[_Damage, ...] = (
    _only_praise,
    _praise_at_the_end,
    _cut_off,
    _without_verdict,
    _only_verdict,
    _sentence_twice,
    _foreign_sentence,
    _spliced,
    _one_opinion_word,
    _rambling,
    _shuffled,
    _words_dropped,
    _word_doubled,
    _words_replaced,
)

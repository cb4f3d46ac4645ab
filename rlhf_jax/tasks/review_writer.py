"""Writes correct reviews of any sentiment."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from rlhf_jax.tasks.review_grammar import (
    idiomatic,
    indefinite_article,
    opinion_value,
    write_out,
)
from rlhf_jax.tasks.review_words import (
    ASPECTS,
    CLOSERS,
    DENIALS,
    FEELING_INTENSIFIERS,
    FEELINGS,
    INTENSIFIERS,
    INTENTIONS,
    KINDS,
    OPENERS,
    OPINIONS,
)

_T = TypeVar("_T")

_LARGEST_MOOD = 3.2
_MOOD_SPREAD = 0.8  # std of a judgement around the mood of its review
_STEP = 0.25  # grid size of moods,
_REACH = 0.5  # maximum distance of a phrase from it;
_LAST_STEP = 14  # at 3.5 both "superb" and "absolutely superb" are in reach
_PLAIN, _INTENSIFIED, _DENIED = 0.55, 0.3, 0.15  # probabilities, if all are possible

_THEME_WEIGHT = 4  # prefers theme-specific words


@dataclasses.dataclass(frozen=True)
class _Phrase:
    text: str
    value: float
    word: str
    weight: float

    @property
    def denied(self) -> bool:
        return self.text.startswith(tuple(DENIALS))


@dataclasses.dataclass
class _Draft:
    """A partial review."""

    rng: np.random.Generator
    kind: str
    mood: float
    aspects: list[str]  # not yet judged
    words: set[str]  # opinion words and lead-ins used
    values: list[float]  # of the judgements so far


def write_review(
    rng: np.random.Generator, kind: str, *, mood: float | None = None
) -> str:
    """A correct review: one to three judgements, then a consistent verdict.

    Args:
        rng: random generator; it is advanced.
        kind: the kind of product, a key of `KINDS`.
        mood: the mean value of the judgements; uniform over ±3.2 by default.

    Returns:
        Two or three sentences after a leading space, so that the review continues its
        prompt. Its true reward has no penalty.
    """
    if mood is None:
        mood = rng.uniform(-_LARGEST_MOOD, _LARGEST_MOOD)
    all_aspects = KINDS[kind].aspects
    aspects = [all_aspects[i] for i in rng.permutation(len(all_aspects))]
    draft = _Draft(rng, kind, mood, aspects, set(), [])
    sentences = [write(draft) for write in _pick(rng, _LAYOUTS)]
    return "".join(f" {write_out(sentence)}." for sentence in sentences)


def _one_judgement(draft: _Draft) -> str:
    return _lead_in(draft, OPENERS, 0.2) + _clause(draft)


def _two_judgements(draft: _Draft) -> str:
    first, second = _clause(draft), _clause(draft)
    product = draft.values[-2] * draft.values[-1]
    contrast = product < 0 or (product == 0 and draft.rng.random() < 0.5)
    return f"{first}{', but' if contrast else ' and'} {second}"


def _verdict(draft: _Draft) -> str:
    target = sum(draft.values) / len(draft.values)
    if draft.rng.random() < 0.4:
        phrase = _choose(draft, _opinions(KINDS[draft.kind].theme, False), target)
        closer = _pick(draft.rng, CLOSERS)
        article = indefinite_article(phrase.text)
        it_was = "it was " if draft.rng.random() < 0.5 else ""
        return f"{closer}, {it_was}{article} {phrase.text} {draft.kind}"
    phrase = _choose(draft, _attitudes(draft.kind), target)
    return _lead_in(draft, CLOSERS, 0.4) + phrase.text


# ---- parts of sentences


def _clause(draft: _Draft) -> str:
    name = draft.aspects.pop()
    aspect = ASPECTS[name]
    found = draft.rng.random() < 0.2
    target = draft.rng.normal(draft.mood, _MOOD_SPREAD)
    phrase = _choose(draft, _opinions(aspect.theme, not found), target)
    if found:
        return f"i found the {name} {phrase.text}"
    if draft.rng.random() < 0.25 and not phrase.denied:
        copula = _pick(draft.rng, ("seemed", "felt"))
    else:
        copula = "were" if aspect.plural else "was"
    return f"the {name} {copula} {phrase.text}"


def _lead_in(draft: _Draft, phrases: tuple[str, ...], probability: float) -> str:
    phrase = _pick(draft.rng, phrases)
    if draft.rng.random() < probability and phrase not in draft.words:
        draft.words.add(phrase)
        return f"{phrase}, "
    return ""


def _pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _choose(draft: _Draft, phrases: "_Phrasebook", target: float) -> _Phrase:
    """A phrase near the target value whose opinion word is new in the review."""
    while True:
        phrase = phrases.draw(draft.rng, target)
        if phrase.word not in draft.words:
            break
    draft.words |= {phrase.word} - {""}
    draft.values.append(phrase.value)
    return phrase


# ---- phrases


class _Phrasebook:
    """Phrases, sampled by their value."""

    def __init__(self, phrases: Sequence[_Phrase]):
        self._near = {}  # step → phrases of about that value, cumulative probabilities
        for step in range(-_LAST_STEP, _LAST_STEP + 1):
            near = [p for p in phrases if abs(p.value - step * _STEP) <= _REACH]
            weights = np.cumsum([phrase.weight for phrase in near])
            self._near[step] = near, weights / weights[-1]

    def draw(self, rng: np.random.Generator, target: float) -> _Phrase:
        step = min(max(round(target / _STEP), -_LAST_STEP), _LAST_STEP)
        near, cumulative = self._near[step]
        return near[int(np.searchsorted(cumulative, rng.random(), side="right"))]


@functools.cache
def _opinions(theme: str, with_denials: bool) -> _Phrasebook:
    """Idiomatic opinions for a theme, with weights."""
    phrases = []
    for word, opinion in OPINIONS.items():
        if opinion.theme not in ("any", theme):
            continue
        weight = 1 if opinion.theme == "any" else _THEME_WEIGHT
        # "not superb" is understandable but rare.
        deniable = with_denials and abs(opinion.grade) in (1, 2)
        families = (
            (_PLAIN, (None,), (None,)),
            (_INTENSIFIED, (None,), tuple(INTENSIFIERS)),
            (_DENIED, tuple(DENIALS) if deniable else (), (None, *INTENSIFIERS)),
        )
        for share, denials, intensifiers in families:
            forms = [
                (denial, intensifier)
                for denial in denials
                for intensifier in intensifiers
                if idiomatic(denial, intensifier, opinion.grade)
            ]
            for denial, intensifier in forms:
                text = " ".join(part for part in (denial, intensifier, word) if part)
                value = opinion_value(denial, intensifier, opinion.grade)
                phrases.append(_Phrase(text, value, word, weight * share / len(forms)))
    return _Phrasebook(phrases)


@functools.cache
def _attitudes(kind: str) -> _Phrasebook:
    """Feelings and intentions about a product of this kind."""
    phrases = []
    for past, (bare, grade) in FEELINGS.items():
        phrases.append(_Phrase(f"i {past} it", grade, bare, 1.0))
        denied = opinion_value("not", None, grade)
        phrases.append(_Phrase(f"i did not {bare} it", denied, bare, 0.5))
        for intensifier in FEELING_INTENSIFIERS:
            if idiomatic(None, intensifier, grade):
                value = opinion_value(None, intensifier, grade)
                text = f"i {intensifier} {past} it"
                phrases.append(_Phrase(text, value, bare, 0.4))
    for intention, value in INTENTIONS.items():
        for act in ("recommend it", f"{KINDS[kind].again} again"):
            text = " ".join(f"i would {intention} {act}".split())
            phrases.append(_Phrase(text, value, "", 0.7))
    return _Phrasebook(phrases)


_LAYOUTS = (
    (_one_judgement, _verdict),
    (_two_judgements, _verdict),
    (_one_judgement, _one_judgement, _verdict),
)

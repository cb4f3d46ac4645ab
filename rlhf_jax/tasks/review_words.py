"""The vocabulary of the review task: products, aspects, opinions, intensifiers."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Opinion:
    """The meaning of an adjective."""

    grade: int  # -3 (terrible) … 3 (superb)
    theme: str  # "any", or the one theme it suits: soup is tasty, acting is not


@dataclasses.dataclass(frozen=True)
class Aspect:
    """A part of a product that a review can judge."""

    theme: str
    plural: bool


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of product."""

    theme: str  # of the adjectives that fit the product as a whole
    again: str  # the verb in "I would … again"
    aspects: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Intensifier:
    """A word that makes an opinion stronger or weaker."""

    factor: float
    grades: frozenset[int]  # the grades it goes with: "very good", not "very superb"


def _frozen(table: dict[str, _T]) -> Mapping[str, _T]:
    return MappingProxyType(table)


_OPINIONS_BY_THEME = {
    "any": {
        3: "superb brilliant wonderful excellent outstanding perfect magnificent",
        2: "good great lovely impressive delightful charming",
        1: "decent fine nice pleasant",
        0: "average ordinary",
        -1: "mediocre flawed forgettable modest",
        -2: "bad poor disappointing annoying unpleasant",
        -3: "terrible awful dreadful horrible appalling miserable disastrous",
    },
    "story": {3: "gripping", 2: "witty clever", -1: "slow", -2: "dull boring silly"},
    "food": {3: "delicious", 2: "tasty", 1: "fresh", -1: "bland", -2: "stale"},
    "people": {2: "friendly", 1: "polite", -2: "rude careless", -3: "hostile"},
    "place": {3: "spotless", 2: "cosy", 1: "clean", -2: "dirty", -3: "filthy"},
    "craft": {3: "dazzling", 2: "elegant", 1: "smooth", -1: "dated", -2: "clumsy"},
}

OPINIONS: Mapping[str, Opinion] = _frozen(
    {
        word: Opinion(grade, theme)
        for theme, grades in _OPINIONS_BY_THEME.items()
        for grade, words in grades.items()
        for word in words.split()
    }
)

_ASPECTS_BY_THEME = {
    "story": ("plot ending dialogue", "jokes scenes chapters lyrics"),
    "food": ("soup bread fish dessert wine breakfast", "sauces"),
    "people": ("staff cast chef heroine singer", "waiters actors characters"),
    "place": ("terrace kitchen room", "tables"),
    "craft": ("music sound guitar style prose camera", "songs drums costumes effects"),
}

ASPECTS: Mapping[str, Aspect] = _frozen(
    {
        name: Aspect(theme, plural)
        for theme, (singulars, plurals) in _ASPECTS_BY_THEME.items()
        for names, plural in ((singulars, False), (plurals, True))
        for name in names.split()
    }
)


def _kind(theme: str, again: str, aspects: str) -> Kind:
    return Kind(theme, again, tuple(aspects.split()))


KINDS: Mapping[str, Kind] = _frozen(
    {
        "film": _kind(
            "story",
            "watch it",
            "plot ending dialogue jokes scenes heroine characters cast actors music "
            "sound style camera costumes effects",
        ),
        "novel": _kind(
            "story",
            "read it",
            "plot ending dialogue jokes scenes heroine characters chapters style prose",
        ),
        "restaurant": _kind(
            "place",
            "eat there",
            "soup bread fish dessert wine breakfast sauces staff chef waiters terrace "
            "kitchen room tables",
        ),
        "album": _kind(
            "craft", "hear it", "lyrics singer music sound guitar style songs drums"
        ),
    }
)

_ALL = frozenset({-3, -2, -1, 0, 1, 2, 3})
_GRADUAL = frozenset({-2, -1, 1, 2})

INTENSIFIERS: Mapping[str, Intensifier] = _frozen(
    {
        "absolutely": Intensifier(1.3, frozenset({-3, 3})),
        "utterly": Intensifier(1.3, frozenset({-3})),
        "extremely": Intensifier(1.4, _GRADUAL),
        "truly": Intensifier(1.2, _ALL - {0}),
        "really": Intensifier(1.2, _ALL - {0}),
        "very": Intensifier(1.2, _GRADUAL | {0}),
        "quite": Intensifier(0.8, _GRADUAL | {0}),
        "fairly": Intensifier(0.7, frozenset({1, 2})),
        "rather": Intensifier(0.7, frozenset({-2, -1})),
        "slightly": Intensifier(0.5, frozenset({-2, -1})),
    }
)
DENIABLE_INTENSIFIERS = ("very", "really")  # "not very good", "never really bad"

# Strength of a denial: the soup was not cold, the service was never rude.
DENIALS: Mapping[str, float] = _frozen({"not": 1.0, "never": 1.5})

COPULAS: Mapping[str, bool | None] = _frozen(  # True: goes with a plural, None: either
    {"was": False, "were": True, "seemed": None, "felt": None}
)

# What the reviewer felt: the past tense, its bare form, and its grade.
FEELINGS: Mapping[str, tuple[str, int]] = _frozen(
    {
        "loved": ("love", 3),
        "enjoyed": ("enjoy", 2),
        "liked": ("like", 1),
        "disliked": ("dislike", -2),
        "regretted": ("regret", -2),
        "hated": ("hate", -3),
    }
)
FEELING_INTENSIFIERS = ("absolutely", "truly", "really", "quite", "rather")

# What the reviewer would do: recommend it, or come back to it.
INTENTIONS: Mapping[str, float] = _frozen(
    {
        "": 2.0,
        "gladly": 2.5,
        "certainly": 3.0,
        "perhaps": 1.0,
        "hardly": -1.0,
        "not": -2.0,
        "never": -3.0,
    }
)

OPENERS = ("to me", "frankly", "this time", "at first")
CLOSERS = ("overall", "in short", "all in all", "in the end")

PROMPT_OPENINGS = ("Review of", "My review of", "About", "Notes on", "My view of")
NAME_ADJECTIVES = (
    "Silent Golden Hidden Broken Distant Little Crimson Wooden Empty Burning Frozen "
    "Velvet Lonely Silver Secret Wandering Northern Paper Gentle Midnight"
).split()
NAME_NOUNS = (
    "Harbour Garden River Lantern Mirror Forest Island Bridge Tower Sparrow Orchard "
    "Winter Compass Meadow Window Castle Anchor Letter Mountain Violin"
).split()

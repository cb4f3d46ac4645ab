"""The review task: prompts, demonstrations, and preferences of a simulated annotator.

A prompt names a product, as in `Review of the film The Silent Harbour:`, and the
response is a review of two or three short sentences. Demonstrations are correct reviews
of all sentiments. The annotator prefers by the true reward, with noise, so the best
possible accuracy of a reward model on its pairs is known. Prompts of the two splits
never share a name.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf_jax.tasks.review_reward import (
    explain_reward,
    prompt_kind,
    true_reward,
    true_rewards,
)
from rlhf_jax.tasks.review_spoiler import spoil
from rlhf_jax.tasks.review_words import (
    KINDS,
    NAME_ADJECTIVES,
    NAME_NOUNS,
    PROMPT_OPENINGS,
)
from rlhf_jax.tasks.review_writer import write_review

__all__ = [
    "ANNOTATOR_TEMPERATURE",
    "Demonstration",
    "Preference",
    "bayes_accuracy",
    "explain_reward",
    "label_pairs",
    "make_demonstrations",
    "make_preferences",
    "make_prompts",
    "true_reward",
    "true_rewards",
]

Seed = int | np.random.Generator
Split = Literal["train", "heldout"]

ANNOTATOR_TEMPERATURE = 0.7  # reward difference at which the odds are e to 1

_HELDOUT_EVERY = 5  # one name in five is held out; its words occur in training
_REWORKED = 0.1  # of the pairs set a review against the same review, spoiled;
_SPOILED = 0.08  # of the responses in the other pairs


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A demonstration. `prompt + response` is the full text."""

    prompt: str
    response: str  # with a leading space


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two responses to a prompt, and which of them the annotator preferred."""

    prompt: str
    chosen: str
    rejected: str
    probability: float  # that the annotator prefers `chosen`: may be below 1/2


def make_prompts(seed: Seed, n: int, split: Split = "train") -> list[str]:
    """`n` prompts in random order, all different until the split is exhausted.

    A split has every kind of product and every opening with its own names: 6,400
    prompts under 320 names to train on, 1,600 under 80 other names held out.

    Raises:
        ValueError: if `split` is neither "train" nor "heldout", or `n` is negative.
    """
    if n < 0:
        raise ValueError(f"n={n} prompts requested; expected 0 or more")
    rng = np.random.default_rng(seed)
    space = list(itertools.product(PROMPT_OPENINGS, KINDS, _names(split)))
    rounds = [rng.permutation(len(space)) for _ in range(-(-n // len(space)))]
    chosen = (space[i] for i in itertools.islice(itertools.chain(*rounds), n))
    return [f"{opening} the {kind} The {name}:" for opening, kind, name in chosen]


def make_demonstrations(
    seed: Seed, n: int, split: Split = "train"
) -> list[Demonstration]:
    """`n` prompts with a correct review each; moods are uniform, so rewards average
    0."""
    rng = np.random.default_rng(seed)
    return [
        Demonstration(prompt, write_review(rng, prompt_kind(prompt)))
        for prompt in make_prompts(rng, n, split)
    ]


def make_preferences(
    seed: Seed,
    n: int,
    split: Split = "train",
    *,
    temperature: float = ANNOTATOR_TEMPERATURE,
) -> list[Preference]:
    """`n` prompts with two different responses each, labelled by the annotator.

    In a tenth of the pairs one response is a corrupted copy of the other; in the rest
    one response in twelve is corrupted. A policy in training leaves the grammar, and
    the reward model must have seen such text to score it.
    """
    rng = np.random.default_rng(seed)
    prompts = make_prompts(rng, n, split)
    pairs = [_draw_pair(rng, prompt_kind(prompt)) for prompt in prompts]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return label_pairs(rng, prompts, first, second, temperature=temperature)


def label_pairs(
    seed: Seed,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    temperature: float = ANNOTATOR_TEMPERATURE,
) -> list[Preference]:
    """The annotator's choice between two responses to each prompt.

        P(first preferred) = 1 / (1 + exp(-(r_first - r_second) / temperature))

    with r the true reward: Bradley and Terry, 1952. Equal responses have probability
    1/2.

    Raises:
        ValueError: if the three lists differ in length, a prompt is not a review
            prompt, or `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not positive")
    rng = np.random.default_rng(seed)
    difference = true_rewards(prompts, first) - true_rewards(prompts, second)  # [N]
    probability = 1.0 / (1.0 + np.exp(-difference / temperature))
    first_wins = rng.random(len(prompts)) < probability
    return [
        Preference(prompt, a, b, float(p)) if wins else Preference(prompt, b, a, 1 - p)
        for prompt, a, b, p, wins in zip(
            prompts, first, second, probability.tolist(), first_wins, strict=True
        )
    ]


def bayes_accuracy(preferences: Sequence[Preference]) -> float:
    """The expected accuracy of the best possible scorer on these pairs.

    It knows the true reward and picks the likelier winner of each pair; the rest is
    annotator noise.

    Raises:
        ValueError: if there are no pairs.
    """
    if not preferences:
        raise ValueError("bayes_accuracy needs at least one pair, got none")
    return float(np.mean([max(p.probability, 1 - p.probability) for p in preferences]))


def _names(split: Split) -> list[str]:
    """The names of a split. Each adjective and each noun occurs in both."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown; expected 'train' or 'heldout'")
    return [
        f"{adjective} {noun}"
        for i, adjective in enumerate(NAME_ADJECTIVES)
        for j, noun in enumerate(NAME_NOUNS)
        if ((i + j) % _HELDOUT_EVERY == 0) == (split == "heldout")
    ]


def _draw_pair(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    if rng.random() < _REWORKED:
        first = second = write_review(rng, kind)
        while second == first:
            second = spoil(rng, kind, first)
        return (first, second) if rng.random() < 0.5 else (second, first)
    first = second = _draw_response(rng, kind)
    while second == first:
        second = _draw_response(rng, kind)
    return first, second


def _draw_response(rng: np.random.Generator, kind: str) -> str:
    review = write_review(rng, kind)
    return spoil(rng, kind, review) if rng.random() < _SPOILED else review

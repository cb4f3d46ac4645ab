"""A number puzzle: combine the given numbers so that they make the target.

    3,5,7->26:   →   7*3+5                                                    as it is
    3,5,7->26:   →   <think>7*3=21;21+5=26</think><answer>7*3+5</answer>

Every number is used exactly once, with `+ - * /` and brackets. Difficulty is the count
of numbers, and how many of the operations have to be `*` or `/`. Any solution is right,
so the reward is `solves_countdown`, which reads the puzzle from the prompt and the
expression with a parser of its own; `answer` is one solution of many.

References:
    Gandhi et al., 2024, arXiv:2404.03683 (Countdown as a task for language models);
    Pan et al., 2025, TinyZero (as a reward for reinforcement learning).
"""

import dataclasses
import functools
import itertools
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from rlhf_jax.tasks.problems import (
    Demonstration,
    Seed,
    Split,
    demonstrate,
    draw_distinct,
    in_split,
)
from rlhf_jax.tasks.verifiable import final_answer

NUMBERS = range(1, 13)
TARGETS = range(10, 100)

_PUZZLE = re.compile(r"([0-9]+(?:,[0-9]+)+)->([0-9]+):")
_TOKEN = re.compile(r"[1-9][0-9]*|[-+*/()]")
_LONGEST_EXPRESSION = 64  # characters; bounds how deep brackets are nested


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A puzzle, one solution, and how hard it is."""

    prompt: str  # "3,5,7->26:"
    answer: str  # "7*3+5"
    numbers: int  # how many are given
    products: int  # the least * and / of any solution


class _Solution(NamedTuple):
    """An expression; the least of several is the simplest."""

    products: int
    length: int
    text: str
    root: str  # the operation done last; empty for a number
    steps: tuple[str, ...]


def make_problems(
    seed: Seed, number: int, split: Split = "train", *, numbers: int = 3
) -> list[Problem]:
    """`number` different puzzles in random order; each can be solved.

    Numbers are 1 to 12, sorted, and may occur twice; targets are 10 to 99. The split
    "harder" has the puzzles whose solutions all need two or more of `*` and `/`; one is
    enough in the other splits. Solutions, for this, have positive whole numbers all
    along. There are, in "train", "heldout" and "harder":

        3 numbers    2,481     612      177
        4 numbers   35,055   8,786   11,983

    Args:
        seed: an integer, or a generator, which moves on.
        number: how many.
        split: "train", "heldout" or "harder".
        numbers: how many numbers a puzzle gives, 3 or 4.

    Raises:
        ValueError: for options out of range, or more puzzles than there are.
    """
    puzzles = _puzzles(split, numbers)
    what = f"puzzles with numbers={numbers} in split {split!r}"
    return [puzzles[i] for i in draw_distinct(seed, number, len(puzzles), what)]


def make_demonstrations(
    seed: Seed,
    number: int,
    split: Split = "train",
    *,
    reasoning: bool,
    numbers: int = 3,
) -> list[Demonstration]:
    """The same puzzles as of `make_problems`, each with its simplest solution.

    Args:
        seed: as there, like all the others.
        number: how many.
        split: "train", "heldout" or "harder".
        reasoning: whether completions show the steps before the answer.
        numbers: how many numbers a puzzle gives, 3 or 4.

    Raises:
        ValueError: for options out of range, or more puzzles than there are.
    """
    problems = make_problems(seed, number, split, numbers=numbers)
    return [
        demonstrate(p.prompt, p.answer, steps(p.prompt) if reasoning else None)
        for p in problems
    ]


def count_problems(split: Split = "train", *, numbers: int = 3) -> int:
    """How many different puzzles `make_problems` can give for these options.

    Raises:
        ValueError: for options out of range.
    """
    return len(_puzzles(split, numbers))


def steps(prompt: str) -> str:
    """The operations of the simplest solution, in order: `7*3=21;21+5=26`.

    Raises:
        ValueError: for a prompt without a puzzle, or one without a solution that has
            positive whole numbers all along.
    """
    given, target = _parse_puzzle(prompt)
    solutions = _solutions(tuple(given))
    if target not in solutions:
        raise ValueError(f"prompt {prompt!r}: the puzzle has no simple solution")
    return ";".join(solutions[target].steps)


def is_correct(prompt: str, response: str) -> bool:
    """Whether a response solves the puzzle that stands last in the prompt.

    The response, or its last `<answer>…</answer>`, must be an expression that uses
    every number exactly once and has the value of the target, exactly.

    Raises:
        ValueError: for a prompt without a puzzle.
    """
    given, target = _parse_puzzle(prompt)
    text = final_answer(response) if "</answer>" in response else response
    found = parse_expression(text or "")
    return found is not None and found == (target, given)


def solves_countdown(
    prompts: list[str], responses: list[str], columns: dict[str, list]
) -> list[float]:
    """A reward: 1.0 where a response solves the puzzle of its prompt, else 0.0.

    Raises:
        ValueError: for a prompt without a puzzle.
    """
    pairs = zip(prompts, responses, strict=True)
    return [float(is_correct(prompt, response)) for prompt, response in pairs]


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression, and its numbers, sorted.

    Expressions have positive whole numbers, `+ - * /` between two operands, round
    brackets, and spaces; anything else gives None, as do signs, leading zeros, division
    by zero, and what is longer than 64 characters.
    """
    tokens = _TOKEN.findall(text) if len(text) <= _LONGEST_EXPRESSION else []
    if "".join(tokens) != text.strip().replace(" ", ""):
        return None
    numbers = sorted(int(token) for token in tokens if token.isdigit())
    rest = tokens[::-1]  # the next token is the last
    try:
        value = _read_sum(rest)
    except (SyntaxError, ZeroDivisionError):
        return None
    return None if rest else (value, numbers)


def _read_sum(rest: list[str]) -> Fraction:
    value = _read_product(rest)
    while rest and rest[-1] in ("+", "-"):
        sign = 1 if rest.pop() == "+" else -1
        value += sign * _read_product(rest)
    return value


def _read_product(rest: list[str]) -> Fraction:
    value = _read_operand(rest)
    while rest and rest[-1] in ("*", "/"):
        operation = rest.pop()
        operand = _read_operand(rest)
        value = value * operand if operation == "*" else value / operand
    return value


def _read_operand(rest: list[str]) -> Fraction:
    token = rest.pop() if rest else ""
    if token.isdigit():
        return Fraction(token)
    if token != "(":
        raise SyntaxError(f"expected a number or a bracket, got {token!r}")
    value = _read_sum(rest)
    if not rest or rest.pop() != ")":
        raise SyntaxError("a bracket is not closed")
    return value


def _parse_puzzle(prompt: str) -> tuple[list[int], int]:
    """The numbers, sorted, and the target."""
    puzzles = _PUZZLE.findall(prompt)
    if not puzzles:
        raise ValueError(f"prompt {prompt!r}: expected a puzzle such as '3,5,7->26:'")
    given, target = puzzles[-1]
    return sorted(map(int, given.split(","))), int(target)


def _puzzles(split: Split, numbers: int) -> list[Problem]:
    if numbers not in (3, 4):
        raise ValueError(f"numbers={numbers}: expected 3 or 4")
    puzzles, keys = _every_puzzle(numbers)
    harder = np.array([puzzle.products >= 2 for puzzle in puzzles])
    return [puzzles[i] for i in np.flatnonzero(in_split(split, keys, harder))]


@functools.cache
def _every_puzzle(numbers: int) -> tuple[list[Problem], np.ndarray]:
    """All puzzles of a count of numbers, and an integer that tells them apart."""
    puzzles, keys = [], []
    for given in itertools.combinations_with_replacement(NUMBERS, numbers):
        for target, solution in sorted(_solutions(given).items()):
            if target in TARGETS:
                puzzle = Problem(
                    prompt=f"{','.join(map(str, given))}->{target}:",
                    answer=solution.text,
                    numbers=numbers,
                    products=solution.products,
                )
                puzzles.append(puzzle)
                keys.append(int("".join(f"{n:02}" for n in (*given, target))))
    return puzzles, np.array(keys)


@functools.cache
def _solutions(given: tuple[int, ...]) -> dict[int, _Solution]:
    """The simplest way to each value that uses all the numbers, which are sorted.

    Values are positive whole numbers all along. Few products make a solution simple,
    then few characters, then the alphabet.
    """
    if len(given) == 1:
        text = str(given[0])
        return {given[0]: _Solution(0, len(text), text, "", ())}
    best: dict[int, _Solution] = {}
    for first, second in _halves(given):
        pairs = itertools.product(_solutions(first).items(), _solutions(second).items())
        for pair in pairs:
            (low, right), (high, left) = sorted(pair)
            for operation, value in _results(high, low):
                solution = _combine(operation, value, (high, left), (low, right))
                best[value] = min(best.get(value, solution), solution)
    return best


def _halves(given: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ways to part the numbers in two, each part sorted."""
    places = range(len(given))
    return {
        (
            tuple(given[i] for i in places if i in chosen),
            tuple(given[i] for i in places if i not in chosen),
        )
        for size in range(1, len(given) // 2 + 1)
        for chosen in itertools.combinations(places, size)
    }


def _results(high: int, low: int) -> list[tuple[str, int]]:
    results = [("+", high + low), ("*", high * low)]
    if high > low:
        results.append(("-", high - low))
    if high % low == 0:
        results.append(("/", high // low))
    return results


def _combine(
    operation: str,
    value: int,
    left: tuple[int, _Solution],
    right: tuple[int, _Solution],
) -> _Solution:
    (a, first), (b, second) = left, right
    is_product = operation in "*/"
    before, after = first.text, second.text
    if is_product and first.root in ("+", "-"):
        before = f"({before})"
    if second.root and (is_product or second.root in "+-"):
        after = f"({after})"
    text = f"{before}{operation}{after}"
    return _Solution(
        products=first.products + second.products + is_product,
        length=len(text),
        text=text,
        root=operation,
        steps=(*first.steps, *second.steps, f"{a}{operation}{b}={value}"),
    )

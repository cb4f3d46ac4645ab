"""Arithmetic, graded by the number of digits and of carries.

    12+39=   →   51                                                   as it is
    12+39=   →   <think>2+9=11;1+3+1=5</think><answer>51</answer>     with reasoning

Both operands of a sum or a difference have the same number of digits, and differences
are not negative; a product has one factor of one digit, 2 to 9. The steps go through
the columns from the right, with what was carried or borrowed.

Rewards are `verifiable.exact_answer` and `verifiable.reasoning_format`. The number of
problems: `count_problems`, and the table in the docstring of `make_problems`.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

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

OPERATIONS = "+-*"
MOST_DIGITS = 3

_NATURAL = "(0|[1-9][0-9]{0,2})"
_PROMPT = re.compile(rf"{_NATURAL}([-+*]){_NATURAL}=")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem, its answer, and its difficulty."""

    prompt: str  # "12+39="
    answer: str  # "51"
    digits: int  # of the first operand
    carries: int  # columns that carry into the next, or borrow from it


def make_problems(
    seed: Seed,
    number: int,
    split: Split = "train",
    *,
    digits: int = 2,
    operations: str = "+-",
    carries: int | None = None,
) -> list[Problem]:
    """`number` different problems in random order, uniform over all that match.

    `12+39=` and `39+12=` are two problems, but always in the same split. The split
    "harder" has the problems with the maximum number of carries, if that is two or
    more: two with two digits and three with three, and for differences two with three.
    The other splits have none of these. Counts in "train", "heldout" and "harder":

        digits            +                        -                        *
        1          76       24        0      43      12       0      64   16      0
        2       4,566    1,149    2,385   3,279     816       0     197   59    464
        3     542,098  136,727  131,175 253,289  63,061  89,100   2,729  688  3,783

    Args:
        seed: an integer, or a generator, which is advanced.
        number: how many.
        split: "train", "heldout" or "harder".
        digits: of each operand, or of the first factor of a product: 1 to 3.
        operations: one or several of `+-*`, from which problems are pooled.
        carries: columns that carry or borrow; None for any number of them.

    Raises:
        ValueError: for options out of range, or more problems than there are.
    """
    rows = _problems(split, digits, operations, carries)
    what = (
        f"problems with digits={digits}, operations={operations!r}, "
        f"carries={carries} in split {split!r}"
    )
    drawn = rows[draw_distinct(seed, number, len(rows), what)]
    return [_problem(digits, *row) for row in drawn.tolist()]


def make_demonstrations(
    seed: Seed,
    number: int,
    split: Split = "train",
    *,
    reasoning: bool,
    digits: int = 2,
    operations: str = "+-",
    carries: int | None = None,
    slips: float = 0.0,
) -> list[Demonstration]:
    """The same problems as `make_problems`, with demonstrations.

    Slips add errors to the demonstrations, and later steps use the wrong results:
    `2+9=12;1+3+1=5` and 52. `answer` is still correct. A model that imitates them is
    correct about as often as they are, and RL can find out which answers are correct.

    Args:
        seed: as there, like the other arguments.
        number: how many.
        split: "train", "heldout" or "harder".
        reasoning: whether completions show the steps before the answer.
        digits: of each operand, or of the first factor of a product.
        operations: one or several of `+-*`.
        carries: columns that carry or borrow; None for any number of them.
        slips: share of columns whose result is off by one, in [0, 1].

    Raises:
        ValueError: for options out of range, or more problems than there are.
    """
    if not 0 <= slips <= 1:
        raise ValueError(f"slips={slips}: expected a share in [0, 1]")
    generator = np.random.default_rng(seed)
    problems = make_problems(
        generator, number, split, digits=digits, operations=operations, carries=carries
    )
    errors = generator.choice(
        [-1, 0, 1], (number, digits), p=[slips / 2, 1 - slips, slips / 2]
    )
    return [
        _demonstrate(problem, row, reasoning)
        for problem, row in zip(problems, errors.tolist(), strict=True)
    ]


def count_problems(
    split: Split = "train",
    *,
    digits: int = 2,
    operations: str = "+-",
    carries: int | None = None,
) -> int:
    """The number of different problems of `make_problems` for these options.

    Raises:
        ValueError: for options out of range.
    """
    return len(_problems(split, digits, operations, carries))


def steps(prompt: str) -> str:
    """The columns of a problem, solved from the right: `2+9=11;1+3+1=5`.

    Raises:
        ValueError: for a prompt that is no such problem.
    """
    return ";".join(line for line, _ in _columns(*_parse(prompt)))


def is_correct(prompt: str, response: str) -> bool:
    """Whether a response is the correct answer of a problem, recomputed.

    Stricter than `exact_answer`: the response, or its last `<answer>…</answer>`, must
    be exactly the number as the task writes it, except for surrounding white space.

    Raises:
        ValueError: for a prompt that is no such problem.
    """
    given = final_answer(response) if "</answer>" in response else response.strip()
    return given == str(_result(*_parse(prompt)))


@functools.cache
def _every_problem(digits: int) -> np.ndarray:
    """All problems with a number of digits, in any split.

    Returns:
        `[N, 4]` int64: index into OPERATIONS, left operand, right operand, carries.
    """
    operands = np.arange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    blocks = []
    for index, operation in enumerate(OPERATIONS):
        second = np.arange(2, 10) if operation == "*" else operands
        left, right = (x.ravel() for x in np.meshgrid(operands, second, indexing="ij"))
        if operation == "-":
            left, right = left[left >= right], right[left >= right]
        carries = _carries(operation, left, right, digits)
        blocks.append(np.stack([np.full_like(left, index), left, right, carries], 1))
    return np.concatenate(blocks)


def _problems(
    split: Split, digits: int, operations: str, carries: int | None
) -> np.ndarray:
    """The rows of `_every_problem` that the options of `make_problems` describe."""
    if digits not in range(1, MOST_DIGITS + 1):
        raise ValueError(f"digits={digits}: expected 1 to {MOST_DIGITS}")
    if not operations or not set(operations) <= set(OPERATIONS):
        raise ValueError(
            f"operations={operations!r}: expected one or several of {OPERATIONS}"
        )
    rows = _every_problem(digits)
    index, left, right, count = rows.T
    most = np.where(index == OPERATIONS.index("-"), digits - 1, digits)
    low, high = np.minimum(left, right), np.maximum(left, right)
    keys = (index * 1000 + low) * 1000 + high  # the same for 12+39 and 39+12
    keep = in_split(split, keys, (count == most) & (most >= 2))
    keep &= np.isin(index, [OPERATIONS.index(operation) for operation in operations])
    return rows[keep if carries is None else keep & (count == carries)]


def _carries(
    operation: str, left: np.ndarray, right: np.ndarray, digits: int
) -> np.ndarray:
    """`[N]`: the columns that carry into the next one, or borrow from it."""
    count = np.zeros_like(left)
    for column in range(1, digits + 1):
        a, b = left % 10**column, right % 10**column
        if operation == "-":
            count += a < b
        else:
            count += (a + b if operation == "+" else a * b) >= 10**column
    return count


def _problem(digits: int, index: int, left: int, right: int, carries: int) -> Problem:
    operation = OPERATIONS[index]
    return Problem(
        prompt=f"{left}{operation}{right}=",
        answer=str(_result(operation, left, right)),
        digits=digits,
        carries=carries,
    )


def _result(operation: str, left: int, right: int) -> int:
    if operation == "+":
        return left + right
    return left - right if operation == "-" else left * right


def _demonstrate(problem: Problem, errors: list[int], reasoning: bool) -> Demonstration:
    """The demonstration of a problem with the given error in each column."""
    columns = _columns(*_parse(problem.prompt), errors)
    *lower, last = [result for _, result in columns]
    given = str(last) + "".join(str(result % 10) for result in reversed(lower))
    lines = ";".join(line for line, _ in columns) if reasoning else None
    found = demonstrate(problem.prompt, str(int(given)), lines)
    return dataclasses.replace(found, answer=problem.answer)


def _columns(
    operation: str, left: int, right: int, errors: Sequence[int] = ()
) -> list[tuple[str, int]]:
    """One equation per column, and its result; the last result is written in full.

    An error is added to its column's result, or subtracted if the result would be
    negative or, in a difference, not a digit.
    """
    columns, carry = [], 0
    for i, top in enumerate(_digits(left)):
        bottom = right if operation == "*" else _digits(right)[i]
        if operation == "-":
            borrow = int(top - carry < bottom)
            top += 10 * borrow
            terms = f"{top}-{carry}-{bottom}" if carry else f"{top}-{bottom}"
            result, most = top - carry - bottom, 9
        else:
            terms = f"{top}{operation}{bottom}" + (f"+{carry}" if carry else "")
            result, most = _result(operation, top, bottom) + carry, None
        if errors:
            result = _erred(result, errors[i], most)
        carry = borrow if operation == "-" else result // 10
        columns.append((f"{terms}={result}", result))
    return columns


def _erred(result: int, error: int, most: int | None) -> int:
    wrong = result + error
    return wrong if 0 <= wrong and (most is None or wrong <= most) else result - error


def _digits(number: int) -> list[int]:
    """The last digit first."""
    return [int(digit) for digit in reversed(str(number))]


def _parse(prompt: str) -> tuple[str, int, int]:
    """Operation, left and right operand."""
    found = _PROMPT.fullmatch(prompt)
    if found is not None:
        left, operation, right = found.groups()
        fits = len(right) == (1 if operation == "*" else len(left))
        if fits and not (operation == "-" and int(left) < int(right)):
            return operation, int(left), int(right)
    raise ValueError(f"prompt {prompt!r}: expected a problem such as '12+39='")

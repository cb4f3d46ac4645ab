"""The number puzzle: by hand, and by trying every expression."""

import functools
import itertools
import re
from fractions import Fraction

import pytest

from rlhf_jax.tasks.countdown import (
    count_problems,
    is_correct,
    make_demonstrations,
    make_problems,
    parse_expression,
    solves_countdown,
    steps,
)
from rlhf_jax.tasks.verifiable import reasoning_format

SPLITS = ("train", "heldout", "harder")
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a, b) if b else -1,
}


@functools.cache
def fewest_products(ordered):
    """By value, the least * and / with which these numbers, in this order, make it.

    Values are positive whole numbers all along; every way to set brackets is tried.
    """
    if len(ordered) == 1:
        return {ordered[0]: 0}
    found = {}
    for cut in range(1, len(ordered)):
        left, right = fewest_products(ordered[:cut]), fewest_products(ordered[cut:])
        for (a, m), (b, n), sign in itertools.product(
            left.items(), right.items(), OPERATIONS
        ):
            value = OPERATIONS[sign](a, b)
            if value > 0 and value == int(value):
                products = m + n + (sign in "*/")
                found[int(value)] = min(found.get(int(value), 9), products)
    return found


def puzzle_of(prompt):
    *numbers, target = map(int, re.findall("[0-9]+", prompt))
    return numbers, target


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7*3+5", 26, [3, 5, 7]),
        ("3+7*5", 38, [3, 5, 7]),
        (" ( 3 + 7 ) * 5 ", 50, [3, 5, 7]),
        ("9-3-2", 4, [2, 3, 9]),
        ("9-(3-2)", 8, [2, 3, 9]),
        ("8/4/2", 1, [2, 4, 8]),
        ("8/(4/2)", 4, [2, 4, 8]),
        ("7/2*4", 14, [2, 4, 7]),
        ("1/3", Fraction(1, 3), [1, 3]),
        ("2-5", -3, [2, 5]),
        ("12", 12, [12]),
        ("((12))", 12, [12]),
    ],
)
def test_expressions_are_read_as_in_arithmetic(text, value, numbers):
    assert parse_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "7*3+",
        "7**3",
        "7//3",
        "-7+3",
        "+7",
        "7+-3",
        "7 3",
        "(7+3",
        "7+3)",
        "()",
        "7(3)",
        "(7)(3)",
        "07+3",
        "0+7",
        "7.0+3",
        "7,3",
        "7+3=10",
        "7+x",
        "__import__('os')",
        "7+3\n+5",
        "7×3",
        "７+3",
        "٣+7",
        "7_0",
        "1e3",
        "7/(3-3)",
        "7%3",
        "1" * 65,
        "(" * 5000,
        "(" * 40 + "7" + ")" * 40,
    ],
)
def test_anything_else_is_no_expression(text):
    assert parse_expression(text) is None


def test_a_solution_uses_every_number_once():
    prompt = "3,5,7->26:"
    for response in ("7*3+5", "5+3*7", " 5+(7*3) ", "<answer>5 + 3*7</answer>"):
        assert is_correct(prompt, response)
    wrong = [
        "26",
        "7*3",
        "7*3+5+5-5",
        "7*3+5=26",
        "7*5-3*3",
        "13*2",
        "7+3+5",
        "7*3+4+1",
    ]
    for response in [*wrong, "7*3+5<answer>26</answer>", "</answer>", "7*3+5\n\n7*3+5"]:
        assert not is_correct(prompt, response)
    assert is_correct("5,5,5->30:", "5*5+5") and not is_correct("5,5,5->30:", "5*6")
    # No simple solution has fractions, but they are right: 8/(3-8/3) = 24.
    assert is_correct("3,3,8,8->24:", "8/(3-8/3)")
    # Of several puzzles the last one counts.
    assert is_correct("1,2,3->6:1+2+3\n3,5,7->26:", "7*3+5")
    with pytest.raises(ValueError, match="expected a puzzle such as '3,5,7->26:'"):
        is_correct("12+39=", "51")


@pytest.mark.parametrize(
    ("numbers", "counts"), [(3, [2481, 612, 177]), (4, [35055, 8786, 11983])]
)
def test_splits_share_nothing_and_have_the_documented_size(numbers, counts):
    assert [count_problems(split, numbers=numbers) for split in SPLITS] == counts
    prompts = [
        {p.prompt for p in make_problems(0, count, split, numbers=numbers)}
        for count, split in zip(counts, SPLITS, strict=True)
    ]
    assert len(set.union(*prompts)) == sum(counts)
    assert 0.15 < counts[1] / (counts[0] + counts[1]) < 0.25


def test_every_puzzle_of_three_numbers_is_there_with_its_difficulty():
    expected = {}
    for numbers in itertools.combinations_with_replacement(range(1, 13), 3):
        for order in itertools.permutations(numbers):
            for value, products in fewest_products(order).items():
                if 10 <= value <= 99:
                    key = (*numbers, value)
                    expected[key] = min(expected.get(key, 9), products)
    found = {}
    for split in SPLITS:
        for problem in make_problems(0, count_problems(split), split):
            numbers, target = puzzle_of(problem.prompt)
            found[(*numbers, target)] = problem.products
            assert (problem.products >= 2) == (split == "harder")
            assert problem.numbers == 3
    assert found == expected


@pytest.mark.parametrize("split", SPLITS)
def test_difficulty_of_four_numbers(split):
    for problem in make_problems(1, 40, split, numbers=4):
        numbers, target = puzzle_of(problem.prompt)
        assert len(numbers) == problem.numbers == 4
        least = min(
            fewest_products(order).get(target, 9)
            for order in itertools.permutations(numbers)
        )
        assert problem.products == least
        assert sum(problem.answer.count(sign) for sign in "*/") == least


@pytest.mark.parametrize("numbers", [3, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_demonstrations_solve_their_puzzle_and_no_other(numbers, split):
    for reasoning in (False, True):
        rows = make_demonstrations(2, 150, split, reasoning=reasoning, numbers=numbers)
        prompts = [row.prompt for row in rows]
        completions = [row.completion for row in rows]
        assert solves_countdown(prompts, completions, {}) == [1.0] * 150
        assert reasoning_format(prompts, completions, {}) == [float(reasoning)] * 150
        shifted = completions[1:] + completions[:1]
        assert solves_countdown(prompts, shifted, {}) == [0.0] * 150
        for row in rows:
            given, target = puzzle_of(row.prompt)
            # Only digits, signs and brackets: Python may read it.
            assert re.fullmatch(r"[0-9+*/()-]+", row.answer)
            assert (
                Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", row.answer))) == target
            )
            assert sorted(map(int, re.findall("[0-9]+", row.answer))) == given
            assert len(row.prompt) <= 16 and len(row.completion) <= 75


def test_steps_are_true_and_end_at_the_target():
    assert steps("3,5,7->26:") == "7*3=21;21+5=26"
    # Brackets: 12 - (9 - 4) would be a solution as well, but 12 + 4 - 9 is shorter.
    assert steps("4,9,12->7:") == "12+4=16;16-9=7"
    for problem in make_problems(3, 200, "harder", numbers=4):
        given, target = puzzle_of(problem.prompt)
        held = list(given)
        for line in steps(problem.prompt).split(";"):
            a, sign, b, c = re.fullmatch(r"(\d+)(\D)(\d+)=(\d+)", line).groups()
            held.remove(int(a))
            held.remove(int(b))
            held.append(int(c))
            assert OPERATIONS[sign](int(a), int(b)) == int(c)
        assert held == [target]
    with pytest.raises(ValueError, match="has no simple solution"):
        steps("3,3,8,8->24:")


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="numbers=5: expected 3 or 4"):
        make_problems(0, 1, numbers=5)
    with pytest.raises(
        ValueError, match="there are 177 different puzzles with numbers=3 in split 'har"
    ):
        make_problems(0, 178, "harder")
    with pytest.raises(ValueError, match="split='test' is unknown"):
        count_problems("test")


def test_everything_follows_its_seed():
    assert make_problems(5, 30) == make_problems(5, 30)
    assert make_problems(5, 30) != make_problems(6, 30)
    assert make_problems(5, 60)[:30] == make_problems(5, 30)

"""Graded arithmetic: by hand, and by what digit sums say about carries."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.models.tokenizer import train_tokenizer
from rlhf_jax.tasks.arithmetic_problems import (
    count_problems,
    is_correct,
    make_demonstrations,
    make_problems,
    steps,
)
from rlhf_jax.tasks.problems import TAGS_TEXT, in_split
from rlhf_jax.tasks.verifiable import exact_answer, reasoning_format

SPLITS = ("train", "heldout", "harder")


def everything(split, **options):
    return make_problems(0, count_problems(split, **options), split, **options)


def whole_numbers(text):
    return [int(number) for number in re.findall("[0-9]+", text)]


def digit_sum(number):
    return sum(int(digit) for digit in str(number))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("12+39=", "2+9=11;1+3+1=5"),
        ("58+67=", "8+7=15;5+6+1=12"),
        ("999+1=", None),
        ("999+901=", "9+1=10;9+0+1=10;9+9+1=19"),
        ("51-39=", "11-9=2;5-1-3=1"),
        ("500-457=", "10-7=3;10-1-5=4;5-1-4=0"),
        ("39-51=", None),
        ("47*6=", "7*6=42;4*6+4=28"),
        ("205*4=", "5*4=20;0*4+2=2;2*4=8"),
        ("47*16=", None),
        ("07+12=", None),
        ("12+39", None),
        ("12+39=\n", None),
        ("1234+1234=", None),
        ("٣+٣=", None),
        ("7/7=", None),
    ],
)
def test_steps_go_through_the_columns(prompt, expected):
    if expected is None:
        with pytest.raises(ValueError, match="expected a problem such as '12\\+39='"):
            steps(prompt)
    else:
        assert steps(prompt) == expected


@pytest.mark.parametrize(
    ("digits", "count"), [(1, 100 + 55 + 80), (2, 8100 + 4095 + 720)]
)
def test_splits_divide_all_problems_and_keep_swapped_operands_together(digits, count):
    split_of = {
        problem.prompt: split
        for split in SPLITS
        for problem in everything(split, digits=digits, operations="+-*")
    }
    totals = [count_problems(s, digits=digits, operations="+-*") for s in SPLITS]
    # All pairs: none twice in a split, none in two of them.
    assert len(split_of) == sum(totals) == count
    swapped = 0
    for prompt, split in split_of.items():
        left, operation, right = re.fullmatch(r"(\d+)(\D)(\d+)=", prompt).groups()
        twin = split_of.get(f"{right}{operation}{left}=", split)
        assert twin == split
        swapped += left != right and f"{right}{operation}{left}=" in split_of
    assert swapped > 100
    # A fifth of the problems outside of "harder", give or take.
    assert 0.15 < totals[1] / (totals[0] + totals[1]) < 0.25


# (digits, operation): problems in train, held out, harder
@pytest.mark.parametrize(
    ("digits", "operation", "counts"),
    [
        (1, "+", [76, 24, 0]),
        (1, "-", [43, 12, 0]),
        (1, "*", [64, 16, 0]),
        (2, "+", [4566, 1149, 2385]),
        (2, "-", [3279, 816, 0]),
        (2, "*", [197, 59, 464]),
        (3, "+", [542_098, 136_727, 131_175]),
        (3, "-", [253_289, 63_061, 89_100]),
        (3, "*", [2729, 688, 3783]),
    ],
)
def test_counts_are_those_of_the_documentation(digits, operation, counts):
    options = {"digits": digits, "operations": operation}
    assert [count_problems(split, **options) for split in SPLITS] == counts
    # Pairs of d-digit numbers, half of them and the equal ones, and 8 factors.
    n = 9 * 10 ** (digits - 1) + (digits == 1)
    assert sum(counts) == {"+": n * n, "-": n * (n + 1) // 2, "*": 8 * n}[operation]
    by_carries = [count_problems(**options, carries=c) for c in range(digits + 1)]
    assert sum(by_carries) == counts[0]
    all_columns = digits - (operation == "-")
    assert all_columns < 2 or by_carries[all_columns] == 0


def test_harder_sums_counted_by_hand():
    # Both columns carry: of the 100 pairs of last digits 45 make 10 or more, and of the
    # 81 pairs of first digits 53 make 9 or more.
    assert count_problems("harder", digits=2, operations="+") == 45 * 53
    # A product of two digits in which only the first column carries on, as 13*4=52.
    assert "13*4=" in {p.prompt for p in everything("train", operations="*", carries=1)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("digits", [2, 3])
def test_answers_carries_and_digits(split, digits):
    # Differences of two digits have no "harder" split; the pool has the other two.
    for problem in make_problems(1, 500, split, digits=digits, operations="+-*"):
        a, b = whole_numbers(problem.prompt)
        c = int(problem.answer)
        assert str(c) == problem.answer
        assert problem.digits == digits == len(str(a))
        if "+" in problem.prompt:
            assert c - a == b
            # Every carry turns ten of one column into one of the next.
            assert digit_sum(a) + digit_sum(b) - digit_sum(c) == 9 * problem.carries
        elif "-" in problem.prompt:
            assert c + b == a and c >= 0
            assert digit_sum(b) + digit_sum(c) - digit_sum(a) == 9 * problem.carries
        else:
            assert c == sum(itertools.repeat(a, b))
            carried, count = 0, 0
            for digit in map(int, reversed(str(a))):
                carried = (digit * b + carried) // 10
                count += carried > 0
            assert problem.carries == count


def test_every_carry_count_can_be_asked_for():
    for carries in (0, 1, 2):
        problems = make_problems(2, 50, digits=3, operations="+", carries=carries)
        assert {p.carries for p in problems} == {carries}
    assert make_problems(2, 0, digits=1, carries=7) == []


@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_steps_are_true_and_make_the_answer(operation):
    problems = make_problems(3, 400, digits=3, operations=operation)
    for problem in problems:
        lines = steps(problem.prompt).split(";")
        assert len(lines) == 3
        results = []
        for line in lines:
            terms, result = line.split("=")
            a, b, *carried = whole_numbers(terms)
            sign = -1 if operation == "-" else 1
            value = a * b if operation == "*" else a + sign * b
            assert value + sign * sum(carried) == int(result)
            assert len(carried) <= 1
            results.append(result)
        written = results[-1] + "".join(r[-1] for r in reversed(results[:-1]))
        assert int(written) == int(problem.answer)


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize("reasoning", [False, True])
def test_demonstrations_get_every_reward_and_wrong_answers_none(digits, reasoning):
    options = {"digits": digits, "operations": "+-*"}
    rows = make_demonstrations(4, 150, reasoning=reasoning, **options)
    problems = make_problems(4, 150, **options)
    prompts = [row.prompt for row in rows]
    completions = [row.completion for row in rows]
    columns = {"answer": [row.answer for row in rows]}
    assert prompts == [p.prompt for p in problems]
    assert columns["answer"] == [p.answer for p in problems]
    assert exact_answer(prompts, completions, columns) == [1.0] * 150
    assert reasoning_format(prompts, completions, {}) == [float(reasoning)] * 150
    assert all(map(is_correct, prompts, completions))

    wrong = [str(int(row.answer) + 1) for row in rows]
    if reasoning:
        wrong = [
            row.completion.replace(f"<answer>{row.answer}<", f"<answer>{other}<")
            for row, other in zip(rows, wrong, strict=True)
        ]
    assert exact_answer(prompts, wrong, columns) == [0.0] * 150
    assert not any(map(is_correct, prompts, wrong))


def errors_of(completion, operation):
    """By how much each column is off, its own carry or borrow taken as it is."""
    steps_taken, answer = re.fullmatch(
        "<think>(.*)</think><answer>(.*)</answer>", completion
    ).groups()
    sign, errors, results = (-1 if operation == "-" else 1), [], []
    for line in steps_taken.split(";"):
        a, b, *carried, result = whole_numbers(line)
        right = (a * b if operation == "*" else a + sign * b) + sign * sum(carried)
        errors.append(result - right)
        if results and operation != "-":  # who erred goes on with what came out
            assert sum(carried) == results[-1] // 10
        results.append(result)
    written = str(results[-1]) + "".join(str(r)[-1] for r in reversed(results[:-1]))
    assert int(answer) == int(written) and answer == str(int(answer))
    if operation == "-":
        assert all(0 <= result <= 9 for result in results)
    return errors


@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_slips_are_one_too_many_or_too_few_in_their_share_of_columns(operation):
    options = {"digits": 3, "operations": operation, "reasoning": True}
    always = make_demonstrations(5, 300, slips=1.0, **options)
    for row in always:
        errors = errors_of(row.completion, operation)
        assert {abs(error) for error in errors} == {1} and len(errors) == 3
        assert is_correct(row.prompt, row.answer)
    rows = make_demonstrations(5, 2_000, slips=0.2, **options)
    errors = [e for row in rows for e in errors_of(row.completion, operation)]
    # 6,000 columns: a standard error of 0.0052, and four of them.
    assert np.mean(np.abs(errors)) == pytest.approx(0.2, abs=0.021)
    assert {-1, 1} <= set(errors) <= {-1, 0, 1}


def test_slips_show_in_the_answer_alone_as_they_do_with_steps():
    with_steps = make_demonstrations(6, 200, reasoning=True, slips=0.5)
    alone = make_demonstrations(6, 200, reasoning=False, slips=0.5)
    for row, short in zip(with_steps, alone, strict=True):
        assert row.prompt == short.prompt and row.answer == short.answer
        assert row.completion.endswith(f"<answer>{short.completion}</answer>")
    assert any(row.completion != row.answer for row in alone)


def test_problems_do_not_depend_on_slips():
    rows = make_demonstrations(7, 50, reasoning=False)
    careless = make_demonstrations(7, 50, reasoning=False, slips=0.9)
    assert [row.prompt for row in rows] == [row.prompt for row in careless]
    assert [row.answer for row in rows] == [row.completion for row in rows]
    with pytest.raises(ValueError, match=r"slips=1.5: expected a share in \[0, 1\]"):
        make_demonstrations(7, 50, reasoning=False, slips=1.5)


def test_only_the_number_itself_is_correct():
    for response in ("51", " 51\n", "<think>2</think><answer>51</answer>"):
        assert is_correct("12+39=", response)
    for response in ("", "051", "51.", "5 1", "+51", "51 51", "<answer>51", "٥١"):
        assert not is_correct("12+39=", response)
    assert not is_correct("12+39=", "51<think>2</think><answer>50</answer>")
    assert not is_correct("12+39=", "</answer>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": 4}, "digits=4: expected 1 to 3"),
        ({"digits": 0}, "digits=0: expected 1 to 3"),
        ({"operations": "+/"}, r"operations='\+/': expected one or several of \+-\*"),
        ({"operations": ""}, "operations='': expected one or several"),
        ({"split": "test"}, "split='test' is unknown; expected 'train', 'heldout' or"),
        (
            {"digits": 1, "number": 120},
            r"number=120: expected 0 to 119, the number of different problems with "
            r"digits=1, operations='\+-', carries=None in split 'train'",
        ),
        ({"number": -1}, "number=-1: expected 0 to 7845"),
        ({"digits": 1, "split": "harder"}, "expected 0 to 0, the number of different"),
        ({"carries": 3}, "expected 0 to 0, the number of different"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    arguments = {"seed": 0, "number": 1} | options
    with pytest.raises(ValueError, match=message) as error:
        make_problems(**arguments)
    assert "\n" not in str(error.value)


def test_everything_follows_its_seed():
    assert make_problems(5, 30) == make_problems(5, 30)
    assert make_problems(5, 30) != make_problems(6, 30)
    assert make_problems(5, 60)[:30] == make_problems(5, 30)
    rng = np.random.default_rng(5)
    assert make_problems(rng, 30) == make_problems(5, 30)
    assert make_problems(rng, 30) != make_problems(5, 30)  # a generator moves on


def test_other_processes_make_the_same():
    program = (
        "import dataclasses, json\n"
        "from rlhf_jax.tasks.arithmetic_problems import make_demonstrations\n"
        "rows = make_demonstrations(7, 20, 'heldout', reasoning=True)\n"
        "print(json.dumps([dataclasses.asdict(row) for row in rows]))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    rows = json.loads(printed[0])
    here = make_demonstrations(7, 20, "heldout", reasoning=True)
    assert rows[:20] == [dataclasses.asdict(row) for row in here]
    assert all(list(row) == ["prompt", "completion", "answer"] for row in rows)


def test_splits_are_the_same_on_every_machine():
    # With these numbers begins SplitMix64 from the seeds 0, 1 and 1234567.
    first = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1, 6457827717110365317]
    keys, never = np.array([0, 1, 1234567]), np.zeros(3, bool)
    held_out = [number % 5 == 0 for number in first]
    assert held_out == [True, True, False]
    assert in_split("heldout", keys, never).tolist() == held_out
    assert in_split("train", keys, never).tolist() == [not held for held in held_out]
    assert in_split("heldout", keys, ~never).tolist() == [False] * 3
    assert in_split("train", keys, ~never).tolist() == [False] * 3
    assert in_split("harder", keys, ~never).tolist() == [True] * 3


def test_text_is_short_and_read_digit_by_digit():
    tokenizer = train_tokenizer([TAGS_TEXT], vocab_size=300, min_frequency=1)
    rows = make_demonstrations(8, 300, "harder", reasoning=True, digits=3)
    assert max(len(row.prompt) for row in rows) == 8
    assert max(len(row.answer) for row in rows) == 4
    assert max(len(row.completion) for row in rows) <= 60
    tags = {"think", "answer", "<", "</", "><", ">"}
    for row in rows:
        tokens = tokenizer.tokenize(row.completion)
        assert tags <= set(tokens)
        assert all(len(token) == 1 for token in set(tokens) - tags)
        assert len(tokens) <= 39  # 11 for the tags, 24 for the steps, 4
        assert tokenizer.tokenize(row.prompt) == list(row.prompt)

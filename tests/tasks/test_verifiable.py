"""Answers found and judged, by hand."""

from fractions import Fraction

import pytest

from rlhf_jax.tasks.verifiable import (
    exact_answer,
    final_answer,
    last_number,
    length_reward,
    matches,
    parse_number,
    reasoning_format,
)

NUMBERS = {
    "18": Fraction(18),
    " 18. ": Fraction(18),
    "1,080": Fraction(1080),
    "109,200,000": Fraction(109_200_000),
    "-5": Fraction(-5),
    "+5": Fraction(5),
    "−7": Fraction(-7),
    "$1,234.50": Fraction(2469, 2),
    "-$5": Fraction(-5),
    "$-5": Fraction(-5),
    "5 €": Fraction(5),
    "20%": Fraction(20),
    "0.1": Fraction(1, 10),
    ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "1e3": Fraction(1000),
    "1.5E-3": Fraction(3, 2000),
    "1/2": Fraction(1, 2),
    "-6/4": Fraction(-3, 2),
    "1.5/0.5": Fraction(3),
    r"\frac{3}{4}": Fraction(3, 4),
    r"-\dfrac{3}{4}": Fraction(-3, 4),
    r"\$1{,}000": Fraction(1000),
    r"$1\,000$": Fraction(1000),
    r"20\%": Fraction(20),
    "007": Fraction(7),
}

NO_NUMBERS = [
    *("", " ", ".", "-", "$", "%", "abc", "5 kg", "3 4", "3-4", "--3", "- 3", "1.2.3"),
    *("1,23", "1,2345", "12,34,567", ",123", "1/0", "1/", "/2", "1e", "1e1000", "٣"),
    *("nan", "inf", "0x10", "1_000", "9" * 401, "9" * 5000),
]


@pytest.mark.parametrize("text", NUMBERS)
def test_parse_number(text):
    assert parse_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_parse_number_refuses(text):
    assert parse_number(text) is None


def test_an_exponent_costs_no_memory():
    assert parse_number("1e999") == 10**999
    assert parse_number("1e999999999") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She eats 3 and sells 16 - 3 = 13 eggs.", "13"),
        ("16-3-4=9", "9"),
        ("pages 3-5", "5"),
        ("(2)-3", "3"),
        ("it fell to -3 degrees", "-3"),
        ("x=-3", "-3"),
        ("It costs $1,000.50 in total.", "$1,000.50"),
        ("12345,678", "678"),
        ("1,2345", "2345"),
        ("3, 4", "4"),
        ("half is 1/2.", "1/2"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        ("5kg", "5"),
        ("1.2.3", "3"),
        ("none at all", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 * 3 = 18\n#### 18", "18"),
        ("#### 1\nno, wait\n####  2 \nThe rest 3", "2"),
        ("#### 5\n#### \n", "5"),
        ("##### 5\nthat is 6", "6"),
        # the order of the rules
        (r"\boxed{7} <answer>8</answer> 9 #### 6", "6"),
        (r"<answer>8</answer> \boxed{7} 9", "7"),
        ("<answer> 8 apples </answer> 9", "8 apples"),
        ("first 8, then 9", "9"),
        # braces
        (r"\boxed{\frac{1}{2}} and", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed {2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ \boxed{3}", "3"),
        (r"\boxed{4} but \boxed{5", "4"),  # the second one is cut off
        (r"\boxed{5", "5"),  # by the last rule
        # tags
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("</answer>3<answer>", "3"),
        ("<answer>x\ny</answer>", "x\ny"),
        ("nothing", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_final_answer_of_a_hostile_text_takes_no_quadratic_time():
    # A rule that looks for the end of each opening would take minutes here.
    for opening in (r"\boxed{", "<answer>", "####", "{", "1,111,", "$-"):
        assert final_answer(opening * 50_000 + " \n#### 7") == "7"
    assert final_answer("x" * 300_000) is None


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("6 * 3 = 18", "18", 1.0),
        ("6 * 3 = 18.00.", "18", 1.0),
        ("#### 18 dollars", "#### 18", 1.0),
        (r"\boxed{\$1{,}000}", "1000", 1.0),
        ("<answer>The answer is 18.</answer>", 18, 1.0),
        ("it is 0.1", 0.1, 1.0),  # exactly, though the float is not
        ("it is 50%", "50", 1.0),
        ("it is 2/4", "0.5", 1.0),
        ("x = -3", "3", 0.0),
        ("0.333", "1/3", 0.0),
        ("#### 18 or 19", "18", 0.0),  # a guess at both is none
        ("#### 18 or 19", "19", 0.0),
        ("#### unknown, 18", "x", 0.0),
        ("no number", "18", 0.0),
        ("", "18", 0.0),
        ("1/0", "0", 0.0),
        # The solution's own numbers are no answers.
        ("9", "9 * 2 = 18\n#### 18", 0.0),
        # text
        ("Paris", "Paris", 1.0),
        (r"It is \boxed{ Paris  city. }", "Paris city", 1.0),
        ("<answer>Rome</answer>", "Paris", 0.0),
        ("I think Paris", "Paris", 0.0),
        ("Apollo 12", "Apollo 11", 0.0),
        ("11", "Apollo 11", 0.0),
    ],
)
def test_exact_answer(response, answer, score):
    assert exact_answer(["2 + 2?"], [response], {"answer": [answer]}) == [score]


def test_exact_answer_keeps_the_rows_apart():
    responses, answers = ["1", "2", "3"], ["1", "3", "3"]
    scores = exact_answer([""] * 3, responses, {"answer": answers, "level": [1, 2, 3]})
    assert scores == [1.0, 0.0, 1.0]


def test_exact_answer_needs_its_column():
    with pytest.raises(ValueError, match=r'column "answer"; there are level, solution'):
        exact_answer(["a"], ["1"], {"solution": ["1"], "level": [3]})
    with pytest.raises(ValueError, match="of the row is missing"):
        exact_answer(["a"], ["1"], {"answer": [None]})


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        ("", "<think>a</think><answer>b</answer>", 1.0),
        ("", "\n<think>\na < b\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("Solve. <think>\n", "a</think><answer>b</answer>", 1.0),
        ("Solve. <think>\n", "<think>a</think><answer>b</answer>", 0.0),
        ("Think in <think> tags.", "a</think><answer>b</answer>", 0.0),
        ("", "<answer>b</answer><think>a</think>", 0.0),
        ("", "<think>a</think><answer>b</answer>.", 0.0),
        ("", "So: <think>a</think><answer>b</answer>", 0.0),
        ("", "<think>a</think> so <answer>b</answer>", 0.0),
        ("", "<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("", "<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("", "<think>a<answer>b</answer></think>", 0.0),
        ("", "<think>a</think><answer>b", 0.0),
        ("", "<think> </think><answer>b</answer>", 0.0),
        ("", "<think>a</think><answer></answer>", 0.0),
        ("", "", 0.0),
    ],
)
def test_reasoning_format(prompt, response, score):
    assert reasoning_format([prompt], [response], {}) == [score]


def test_matches():
    reward = matches(r"(?i)\bkm\b")
    assert reward([""] * 3, ["5 KM", "5 kms", ""], {}) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"pattern '\(': not a regular expression"):
        matches("(")


def test_length_reward():
    reward = length_reward(target=4, spread=4)
    # |0 - 4| = 4, |3 - 4| = 1, |4 - 4| = 0, |6 - 4| = 2, |9 - 4| = 5
    texts = ["", "abc", "abcd", "abcdef", "abcdefghi"]
    assert reward([""] * 5, texts, {}) == [0.0, 0.75, 1.0, 0.5, 0.0]
    words = length_reward(target=2, spread=1, measure=lambda text: len(text.split()))
    assert words([""] * 2, ["two words", "one"], {}) == [1.0, 0.0]
    with pytest.raises(ValueError, match="spread=0"):
        length_reward(target=3, spread=0)

"""Rewards that need no model: correct answers, response formats.

A reward takes a batch and returns one number per row:

    reward(prompts: list[str], responses: list[str], columns: dict[str, list]) -> list

`columns` holds the other columns of the rows, such as the correct answers. Each reward
here scores rows independently. Every rule takes linear time for any text: a policy in
training can write anything.
"""

import re
from collections.abc import Callable
from fractions import Fraction

Reward = Callable[[list[str], list[str], dict[str, list]], list[float]]

_CURRENCY = "[$€£¥]"
_UNSIGNED = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
)
_NUMBER = re.compile(
    # In "7-3" the hyphen is not a sign.
    rf"(?:(?<![\w)\]}}])[-+]{_CURRENCY}?|{_CURRENCY}[-+]?)?"
    rf"(?:{_UNSIGNED})(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
    rf"(?:/(?:{_UNSIGNED}))?"
)
_LONGEST_NUMBER = 400  # characters; Python cannot parse integers of 4300 digits

_LATEX = {"−": "-", r"\$": "$", r"\%": "%", "{,}": ",", r"\,": "", r"\!": ""}
_LATEX_SIGN = re.compile("|".join(map(re.escape, _LATEX)))
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")

_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_REASONING = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def parse_number(text: str) -> Fraction | None:
    """Parses the whole text as an exact number; None if it is not a single number.

    Accepts signs, thousands separated by commas, decimals, `1.5e-3` and the fractions
    `1/2` and `\\frac{1}{2}`; ignores a currency sign, a percent sign (`20%` is 20) and
    a final period. Text longer than 400 characters, or with an exponent of more than
    three digits, is not a number.
    """
    plain = _without_latex(text).strip().rstrip(".").rstrip("%$€£¥ ")
    if len(plain) > _LONGEST_NUMBER or not _NUMBER.fullmatch(plain):
        return None
    numerator, _, denominator = re.sub("[,$€£¥]", "", plain).partition("/")
    try:
        return Fraction(numerator) / Fraction(denominator or "1")
    except ZeroDivisionError:
        return None


def last_number(text: str) -> str | None:
    """The last number in the text, or None.

    In `16 - 3 = 13 eggs` it is `13`; in `3-5` it is `5`. `parse_number` may still
    reject it: `1/0`.
    """
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def final_answer(text: str) -> str | None:
    """The final answer of a text, by the first of these rules that matches.

    1. the text after the last `####` on its line (GSM8K), even if that is a heading
    2. the last complete `\\boxed{…}`, braces inside it matched (MATH)
    3. the last `<answer>…</answer>` (DeepSeek-R1)
    4. the last number

    Returns:
        The answer, without surrounding white space; None if no rule matches.
    """
    marked = _marked_answer(text)
    return last_number(text) if marked is None else marked


def exact_answer(
    prompts: list[str], responses: list[str], columns: dict[str, list]
) -> list[float]:
    """1.0 if a response gives the correct answer, else 0.0.

    The correct answer is `columns["answer"]`: a number, or a text that may be a full
    solution, whose answer is found by rules 1 to 3 of `final_answer`. If it is a
    number, `final_answer` of the response must contain that number and no other, so `18
    dollars` is correct and `18 or 19` is wrong; numbers are compared exactly:
    `$1,000.00` is 1000. Any other answer is compared as text, ignoring white space and
    a final period, to the result of rules 1 to 3, or the whole response.

    Raises:
        ValueError: if there is no column `answer`, or a row's answer is missing.
    """
    if "answer" not in columns:
        names = ", ".join(sorted(columns)) or "no others"
        raise ValueError(f'exact_answer needs the column "answer"; there are {names}')
    pairs = zip(responses, columns["answer"], strict=True)
    return [float(_is_right(response, answer)) for response, answer in pairs]


def reasoning_format(
    prompts: list[str], responses: list[str], columns: dict[str, list]
) -> list[float]:
    """1.0 for `<think>…</think><answer>…</answer>`, else 0.0.

    Each tag must occur once, with text inside each pair and only white space around
    them. If the prompt ends in `<think>`, the response omits that tag. There is no
    partial credit; use a sum of `matches` rewards for that.

    References:
        DeepSeek-AI, 2025, arXiv:2501.12948, section 2.2.2 and table 1.
    """
    pairs = zip(prompts, responses, strict=True)
    return [float(_is_reasoning(prompt, response)) for prompt, response in pairs]


def matches(pattern: str) -> Reward:
    """A reward: 1.0 if the regular expression matches in the response, else 0.0.

    Args:
        pattern: as in the module `re`; flags are inline, as in `(?is)`.

    Raises:
        ValueError: if the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern {pattern!r}: not a regular expression: {error}"
        ) from None

    def matches_pattern(prompts, responses, columns):
        return [float(compiled.search(response) is not None) for response in responses]

    return matches_pattern


def length_reward(
    *, target: int, spread: int, measure: Callable[[str], int] = len
) -> Reward:
    """A reward for responses near a target length.

    max(0, 1 − |length − target| / spread)

    Args:
        target: the length that gets 1.0.
        spread: the distance from it at which the reward reaches 0, at least 1.
        measure: gives the length of a response; default: characters.

    Raises:
        ValueError: for a spread below 1.
    """
    if spread < 1:
        raise ValueError(f"spread={spread}: give at least 1")

    def rewards_length(prompts, responses, columns):
        distances = [abs(measure(response) - target) for response in responses]
        return [max(0.0, 1 - distance / spread) for distance in distances]

    return rewards_length


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(_without_latex(text))


def _without_latex(text: str) -> str:
    """Converts LaTeX signs and fractions to plain text, and the minus to `-`."""
    plain = _LATEX_SIGN.sub(lambda found: _LATEX[found[0]], text)
    return _LATEX_FRACTION.sub(r"\1/\2", plain)


def _marked_answer(text: str) -> str | None:
    """Rules 1 to 3 of `final_answer`."""
    hashes = _HASHES.findall(text)
    if hashes:
        return hashes[-1].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    before, closing, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if opening and closing else None


def _last_boxed(text: str) -> str | None:
    """The content of the complete `\\boxed{…}` that starts last."""
    open_braces: list[tuple[bool, int]] = []  # whether a box, start of its content
    last = (-1, -1)
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{") and brace[0] != r"\{":
            open_braces.append((brace[0] != "{", brace.end()))
        elif brace[0] == "}" and open_braces:
            boxed, start = open_braces.pop()
            if boxed:
                last = max(last, (start, brace.start()))
    return None if last[0] < 0 else text[slice(*last)].strip()


def _is_right(response: str, answer: object) -> bool:
    if answer is None:
        raise ValueError('exact_answer: the column "answer" of the row is missing')
    right = _marked_answer(str(answer)) or str(answer)
    number = parse_number(right)
    if number is None:
        given = _marked_answer(response) or response
        return _as_words(given) == _as_words(right)
    return _number_in(final_answer(response) or "") == number


def _number_in(answer: str) -> Fraction | None:
    """The answer as a number, or the only number in it."""
    number = parse_number(answer)
    if number is None:
        numbers = _numbers(answer)
        number = parse_number(numbers[0]) if len(numbers) == 1 else None
    return number


def _as_words(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")


def _is_reasoning(prompt: str, response: str) -> bool:
    text = f"<think>{response}" if prompt.rstrip().endswith("<think>") else response
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    found = _REASONING.fullmatch(text)
    return found is not None and all(part.strip() for part in found.groups())

"""Plain text with arithmetic, for a base model without reasoning demonstrations.

    90+21=111                                                      a fact
    90+21=0+1=1;9+2=11;111                                         worked out
    <is></is><war></war>17+41=<is>7+1=8;1+4=5</is><war>58</war>    a form, kept
    <ten></ten><ha></ha>61+11=72                                   a form, ignored

One document in ten is a fact, one in ten is worked out. All others begin with a form:
two tags of two to six random letters. Three in ten of these follow it. From this a
model learns that forms can be followed, as real base models do from pretraining. The
tags of `ask_to_reason`, `<think>` and `<answer>`, do not occur. How often a model uses
them depends on generalization, and RL must discover that they are rewarded: the R1-Zero
setting (DeepSeek-AI, 2025, arXiv:2501.12948).
"""

import numpy as np

from rlhf_jax.tasks.arithmetic_problems import make_demonstrations
from rlhf_jax.tasks.problems import Seed, Split

SHARE_WITHOUT_FORM = 0.2
SHARE_KEPT = 0.3  # of the forms

_NEVER = ("think", "answer")
_LETTERS = sorted(set("".join(_NEVER)))  # fewer letters are learned faster


def ask_to_reason(prompt: str) -> str:
    """A problem after the form that its response should have, without explanation."""
    return _form("think", "answer") + prompt


def make_text(
    seed: Seed,
    number: int,
    split: Split = "train",
    *,
    digits: int = 2,
    operations: str = "+-",
    slips: float = 0.0,
) -> list[str]:
    """Documents about different problems, deterministic.

    Args:
        seed: as in `arithmetic.make_problems`, like the other arguments.
        number: how many.
        split: "train", "heldout" or "harder".
        digits: of each operand, or of the first factor of a product.
        operations: one or several of `+-*`.
        slips: as in `arithmetic.make_demonstrations`.

    Raises:
        ValueError: for options out of range, or more problems than there are.
    """
    generator = np.random.default_rng(seed)
    demonstrations = make_demonstrations(
        generator,
        number,
        split,
        reasoning=True,
        digits=digits,
        operations=operations,
        slips=slips,
    )
    return [_document(generator, d.prompt, d.completion) for d in demonstrations]


def _document(generator: np.random.Generator, prompt: str, completion: str) -> str:
    """One of the four kinds."""
    steps, _, answer = (
        completion.removeprefix("<think>")
        .removesuffix("</answer>")
        .partition("</think><answer>")
    )
    has_form, is_kept, is_worked_out = generator.random(3) < (
        1 - SHARE_WITHOUT_FORM,
        SHARE_KEPT,
        0.5,
    )
    first, second = _name(generator), _name(generator)
    form = _form(first, second) if has_form else ""
    if has_form and is_kept:
        kept = f"<{first}>{steps}</{first}><{second}>{answer}</{second}>"
        return f"{form}{prompt}{kept}"
    return (
        f"{form}{prompt}{steps};{answer}" if is_worked_out else form + prompt + answer
    )


def _form(first: str, second: str) -> str:
    return f"<{first}></{first}><{second}></{second}>"


def _name(generator: np.random.Generator) -> str:
    letters = generator.choice(_LETTERS, generator.integers(2, 7))
    name = "".join(letters)
    return _name(generator) if name in _NEVER else name

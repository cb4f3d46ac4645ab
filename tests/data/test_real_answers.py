"""The answers of GSM8K in full; skipped where they are absent."""

import json
import os
from pathlib import Path

import pytest

from rlhf_jax.tasks.verifiable import (
    exact_answer,
    final_answer,
    last_number,
    parse_number,
)


@pytest.fixture(scope="module")
def solutions() -> list[str]:
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("RLHF_JAX_DATA", beside)) / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    lines = [
        line
        for name in ("train.jsonl", "test.jsonl")
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    ]
    return [json.loads(line)["answer"] for line in lines]


def right_answer(solution: str) -> int:
    """Every answer is a whole number, some with commas."""
    return int(solution.rpartition("####")[2].replace(",", ""))


@pytest.mark.realdata
def test_every_answer_is_found(solutions):
    assert len(solutions) == 8792
    for solution in solutions:
        answer = final_answer(solution)
        assert answer is not None and parse_number(answer) == right_answer(solution)


@pytest.mark.realdata
def test_right_and_wrong_responses_are_told_apart(solutions):
    columns, prompts = {"answer": solutions}, [""] * len(solutions)
    answers = [right_answer(solution) for solution in solutions]
    for right in (
        solutions,
        [f"\\boxed{{{answer:,}}}" for answer in answers],
        [f"<answer>It is ${answer:,}.00.</answer>" for answer in answers],
    ):
        assert exact_answer(prompts, right, columns) == [1.0] * 8792
    for wrong in (
        [f"#### {answer + 1}" for answer in answers],
        [f"\\boxed{{{answer}.01}}" for answer in answers],
        [f"<answer>{answer} or {answer + 1}</answer>" for answer in answers],
    ):
        assert exact_answer(prompts, wrong, columns) == [0.0] * 8792


@pytest.mark.realdata
def test_the_last_number_where_the_answer_line_is_cut_off(solutions):
    found = [last_number(solution.rpartition("####")[0]) for solution in solutions]
    right = sum(
        number is not None and parse_number(number) == right_answer(solution)
        for number, solution in zip(found, solutions, strict=True)
    )
    # 97.2 %. Of the others the last sentence goes on past its answer, "$25 for selling
    # 14 peaches", or is of another kind: "5:00 pm", "$100 000".
    assert right == 8546

"""Plain text about arithmetic: what its documents are, and what they never show."""

import json
import os
import re
import subprocess
import sys

import pytest

from rlhf_jax.tasks.arithmetic_problems import is_correct, steps
from rlhf_jax.tasks.arithmetic_text import ask_to_reason, make_text
from rlhf_jax.tasks.verifiable import exact_answer, reasoning_format

DOCUMENT = re.compile(
    r"(?:<([a-z]{2,6})></\1><([a-z]{2,6})></\2>)?"  # the form
    r"([0-9]+[-+*][0-9]+=)"
    r"(?:<\1>([^<>]+)</\1><\2>([0-9]+)</\2>|(?:([^<>]+);)?([0-9]+))"
)


def parse(text):
    found = DOCUMENT.fullmatch(text)
    assert found, text
    first, second, problem, kept, kept_answer, worked_out, answer = found.groups()
    return problem, (first, second), kept, worked_out, kept_answer or answer


@pytest.mark.parametrize("operations", ["+-", "*"])
def test_every_document_is_one_of_the_four_kinds_and_right(operations):
    texts = make_text(0, 300, digits=3, operations=operations)
    kinds = set()
    for text in texts:
        problem, tags, kept, worked_out, answer = parse(text)
        assert is_correct(problem, answer)
        assert (kept or worked_out) in (None, steps(problem))
        kinds.add((tags[0] is not None, kept is not None, worked_out is not None))
    # Without a form there is none to keep.
    assert kinds == {
        (False, False, False),
        (False, False, True),
        (True, True, False),
        (True, False, True),
        (True, False, False),
    }


def test_slips_reach_the_text():
    texts = make_text(1, 400, slips=0.35)
    right = [is_correct(problem, answer) for problem, *_, answer in map(parse, texts)]
    # 0.65² = 0.4225, within 4 standard errors of 0.0247.
    assert sum(right) / 400 == pytest.approx(0.4225, abs=0.099)


def test_an_answer_in_the_announced_form_gets_both_rewards():
    problem = "17+41="
    prompt = ask_to_reason(problem)
    assert prompt == "<think></think><answer></answer>17+41="
    response = f"<think>{steps(problem)}</think><answer>58</answer>"
    for reward in (exact_answer, reasoning_format):
        assert reward([prompt], [response], {"answer": ["58"]}) == [1.0]
    assert reasoning_format([prompt], ["7+1=8;1+4=5;58"], {}) == [0.0]
    assert exact_answer([prompt], ["7+1=8;1+4=5;58"], {"answer": ["58"]}) == [1.0]


def test_documents_are_of_different_problems_and_follow_their_seed():
    texts = make_text(2, 1_149 + 816, "heldout")  # all there are
    problems = {parse(text)[0] for text in texts}
    assert len(problems) == len(texts)
    assert make_text(2, 1_149 + 816, "heldout") == texts
    assert make_text(3, 1_149 + 816, "heldout") != texts
    assert not problems & {parse(text)[0] for text in make_text(2, 500)}
    with pytest.raises(ValueError, match="number=2000: expected 0 to 1965"):
        make_text(2, 2_000, "heldout")


def test_other_processes_write_the_same():
    code = (
        "import json; from rlhf_jax.tasks.arithmetic_text import make_text; "
        "print(json.dumps(make_text(4, 20, slips=0.3)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert json.loads(done.stdout) == make_text(4, 20, slips=0.3)

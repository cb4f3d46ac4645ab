"""Pairs, margins and rankings of judgements, and everything that gives none."""

import dataclasses

import pytest

from rlhf_jax.data.comparisons import (
    ALONE,
    CIRCLE,
    LEFT_OUT,
    MAX_ANSWERS,
    REPEATED,
    REVERSED,
    TIE,
    RankedResponses,
    compare,
)
from rlhf_jax.data.judgements import Judgement
from rlhf_jax.data.row_forms import EQUAL, PreferencePair


def judged(line, answers, grades, prompt="p", annotator=None):
    return Judgement(
        prompt=prompt,
        answers=tuple(answers),
        grades=tuple(map(float, grades)),
        places=(f"f:{line}",) * len(answers),
        annotator=annotator,
    )


def ordered(line, answers, **options):
    """A ranking from best to worst."""
    return judged(line, answers, range(len(answers), 0, -1), **options)


def pairs_of(found):
    return [(pair.chosen, pair.rejected, pair.margin) for pair in found.pairs]


def counts(found):
    return {what: finding.count for what, finding in found.findings.items()}


def test_pairs_margins_and_the_ranking_of_grades():
    found = compare([judged(1, "xyz", [2, 5, 1])], margin_step=0.5)
    assert pairs_of(found) == [("y", "x", 1.5), ("x", "z", 0.5), ("y", "z", 2.0)]
    assert found.rankings == [
        RankedResponses(prompt="p", answers=("y", "x", "z"), grades=(5.0, 2.0, 1.0))
    ]
    assert found.findings == {} and found.report() == []
    assert all(isinstance(pair, PreferencePair) for pair in found.pairs)


def test_no_margins_unless_asked_for():
    found = compare([judged(1, "xy", [1, 5])])
    assert found.pairs == [PreferencePair("p", "y", "x", margin=0.0)]


def test_ties_give_no_pair():
    found = compare([judged(3, "xyz", [2, 2, 1])])
    assert pairs_of(found) == [("x", "z", 0.0), ("y", "z", 0.0)]
    assert counts(found) == {TIE: 1}
    assert found.report() == ['1 × equal grades, first f:3: "x" and "y"']
    (ranking,) = found.rankings
    assert ranking.has_ties and ranking.grades == (2.0, 2.0, 1.0)
    assert not compare([ordered(1, "xy")]).rankings[0].has_ties


def test_nothing_but_ties():
    with pytest.raises(ValueError) as caught:
        compare([judged(3, "xy", [2, 2])])
    assert str(caught.value) == (
        'no two responses can be compared: 1 × equal grades, first f:3: "x" and "y"'
    )
    with pytest.raises(ValueError, match="there are no judgements"):
        compare([])


def test_answers_rated_one_by_one_are_joined_by_prompt_and_annotator():
    found = compare(
        [
            judged(1, "x", [5], annotator="ann"),
            judged(2, "x", [2], annotator="bob"),
            judged(3, "z", [1], prompt="q", annotator="ann"),
            judged(4, "y", [3], annotator="ann"),
            judged(5, "y", [1], annotator="bob"),
        ],
        margin_step=1.0,
    )
    # Ann's y is above Bob's x, which says nothing: both prefer x.
    assert pairs_of(found) == [("x", "y", 2.0), ("x", "y", 1.0)]
    assert counts(found) == {ALONE: 1}
    assert found.findings[ALONE].examples == ["f:3"]
    assert [r.answers for r in found.rankings] == [("x", "y"), ("x", "y")]


def test_places_of_both_lines_are_named():
    found = compare(
        [judged(1, "x", [3]), judged(2, "y", [3]), judged(3, "z", [1])],
    )
    assert found.findings[TIE].examples == ['f:1 and f:2: "x" and "y"']


def test_copies_are_left_out_and_agreement_is_not():
    copies = [ordered(1, "xy"), judged(2, "yx", [1, 2]), ordered(3, "xy")]
    found = compare(copies)
    assert len(found.pairs) == 1 and counts(found) == {REPEATED: 2}
    assert found.findings[REPEATED].examples == ["f:2, as at f:1", "f:3, as at f:1"]
    named = [dataclasses.replace(c, annotator=str(i)) for i, c in enumerate(copies)]
    found = compare(named)
    assert len(found.pairs) == 3 and counts(found) == {}
    same = [dataclasses.replace(c, annotator="ann") for c in copies]
    assert len(compare(same).pairs) == 1


def test_equal_answers():
    found = compare([judged(4, ["x", "x", "y"], [3, 2, 1])])
    assert pairs_of(found) == [("x", "y", 0.0), ("x", "y", 0.0)]
    assert counts(found) == {EQUAL: 1, LEFT_OUT: 1} and found.rankings == []
    assert found.findings[EQUAL].examples == ['f:4: "x"']


REVERSE = [ordered(1, "xyz"), ordered(2, "yx"), ordered(3, "xy", prompt="q")]


def test_contradictions_fail():
    with pytest.raises(ValueError) as caught:
        compare(REVERSE)
    assert str(caught.value) == (
        'f:1: "x" is preferred to "y", at f:2 it is not; 2 comparisons contradict '
        'others: correct them, remove them with on_contradiction="drop", or train '
        'on all of them with "keep"'
    )


def test_contradictions_dropped_on_both_sides():
    found = compare(REVERSE, on_contradiction="drop")
    assert [(p.prompt, p.chosen, p.rejected) for p in found.pairs] == [
        ("p", "x", "z"),
        ("p", "y", "z"),
        ("q", "x", "y"),
    ]
    assert counts(found) == {REVERSED: 2, LEFT_OUT: 2}
    assert [r.prompt for r in found.rankings] == ["q"]


def test_contradictions_kept():
    found = compare(REVERSE, on_contradiction="keep")
    assert len(found.pairs) == 5 and len(found.rankings) == 3
    assert counts(found) == {REVERSED: 2}
    assert found.findings[REVERSED].examples == [
        'f:1: "x" is preferred to "y", at f:2 it is not',
        'f:2: "y" is preferred to "x", at f:1 it is not',
    ]


def test_the_first_of_several_that_disagree_is_named():
    judgements = [
        ordered(line, answers, annotator=str(line))
        for line, answers in enumerate(("xy", "yx", "yx"), start=1)
    ]
    found = compare(judgements, on_contradiction="keep")
    assert counts(found) == {REVERSED: 3} and len(found.pairs) == 3
    first, *_ = found.findings[REVERSED].examples
    assert first == 'f:1: "x" is preferred to "y", at f:2 it is not'


def test_circles_are_found_and_what_hangs_on_them_stays():
    circle = [
        ordered(1, "xy"),
        ordered(6, "yb"),  # leads out of the circle
        ordered(2, "yz"),
        ordered(3, "zw"),
        ordered(4, "wx"),
        ordered(5, "ax"),  # leads into it
    ]
    with pytest.raises(ValueError, match="4 comparisons contradict others"):
        compare(circle)
    found = compare(circle, on_contradiction="drop")
    assert pairs_of(found) == [("y", "b", 0.0), ("a", "x", 0.0)]
    assert counts(found) == {CIRCLE: 4, LEFT_OUT: 4}
    examples = found.findings[CIRCLE].examples
    assert len(examples) == 3  # the first three of four
    assert examples[0] == (
        'f:1: "x" is preferred to "y", which at f:2 begins a way back'
    )
    assert len(compare(circle, on_contradiction="keep").pairs) == 6


def test_one_answer_graded_twice_by_the_same_person():
    found = compare(
        [judged(1, "x", [5]), judged(2, "y", [4]), judged(3, "x", [3])],
        on_contradiction="keep",
    )
    assert pairs_of(found) == [("x", "y", 0.0), ("y", "x", 0.0)]
    assert counts(found) == {EQUAL: 1, REVERSED: 2, LEFT_OUT: 1}


def test_the_same_answers_to_another_prompt_contradict_nothing():
    found = compare([ordered(1, "xy"), ordered(2, "yx", prompt="q")])
    assert len(found.pairs) == 2 and found.findings == {}


def test_wrong_options_and_too_many_answers():
    with pytest.raises(ValueError, match=r'on_contradiction="majority": give "fail"'):
        compare(REVERSE, on_contradiction="majority")
    for step in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"margin_step=.*: give 0 or a positive"):
            compare(REVERSE, margin_step=step)
    many = [judged(i, [str(i)], [i]) for i in range(MAX_ANSWERS + 1)]
    with pytest.raises(ValueError, match=r"f:0: 257 responses to the prompt \"p\""):
        compare(many)
    assert len(compare(many[1:]).pairs) == MAX_ANSWERS * (MAX_ANSWERS - 1) // 2

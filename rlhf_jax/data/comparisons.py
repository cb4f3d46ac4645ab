"""Turns judgements into reward model training data, and reports problems.

Two responses with different grades make a pair; equal grades make none. People
contradict each other and themselves: A over B and B over A, or, with several rankings
of one prompt, a cycle from A over B and C back to A. A reversed pair is a cycle of two.
Problems are counted, and the first cases are reported with their lines.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rlhf_jax.data.judgements import Judgement
from rlhf_jax.data.row_forms import EQUAL, PreferencePair
from rlhf_jax.files.printable import shown

OnContradiction = Literal["fail", "drop", "keep"]

TIE = "equal grades"
REPEATED = "judgement repeated"
ALONE = "only one response to its prompt"
REVERSED = "contradicted by another judgement"
CIRCLE = "part of a preference cycle"
LEFT_OUT = "ranking skipped: its pairs are ties or contradictory"

MAX_ANSWERS = 256
"""Per prompt: the number of pairs grows quadratically."""

_NUM_EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedResponses:
    """The responses of one judgement, all different, for losses on full rankings."""

    prompt: str
    answers: tuple[str, ...]  # from best to worst
    grades: tuple[float, ...]  # one per response, descending; equal grades are ties

    @property
    def has_ties(self) -> bool:
        """Whether there are ties, which Plackett–Luce does not support."""
        return len(set(self.grades)) < len(self.grades)


@dataclasses.dataclass
class Finding:
    """The count of a problem, and its first cases."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The training data from judgements."""

    pairs: list[PreferencePair]
    rankings: list[RankedResponses]
    findings: dict[str, Finding]

    def report(self) -> list[str]:
        """One line per kind of finding."""
        return [
            f"{finding.count} × {what}, first {finding.examples[0]}"
            for what, finding in self.findings.items()
        ]


@dataclasses.dataclass(frozen=True)
class _Comparison:
    better: str
    worse: str
    difference: float  # of grades
    place: str

    @property
    def key(self) -> tuple[str, str]:
        return self.better, self.worse


def compare(
    judgements: Iterable[Judgement],
    *,
    margin_step: float = 0.0,
    on_contradiction: OnContradiction = "fail",
) -> Comparisons:
    """Makes pairs and rankings from judgements, with a report of problems.

    A judgement that repeats an earlier one by the same annotator, or if neither
    annotator is known, is a duplicate and is skipped. Different annotators who agree
    are all counted. Judgements of single responses are merged by prompt and annotator.

    Args:
        judgements: ratings or rankings.
        margin_step: margin per unit of grade difference; for rankings, per rank. 0
            disables margins.
        on_contradiction: what to do with pairs on a cycle, including reversed pairs.
            "fail" raises. "drop" removes all of them, and the rankings that contain
            one. "keep" keeps all: the Bradley–Terry loss then learns what fraction of
            annotators preferred each response, which a majority vote would round to 0
            or 1.

    Raises:
        ValueError: for contradictions under "fail", more than `MAX_ANSWERS` responses
            to one prompt, if no pair is left, and for invalid options. One line, with
            the location in the file.
    """
    if not 0 <= margin_step < float("inf"):
        raise ValueError(f"margin_step={margin_step}: give 0 or a positive number")
    if on_contradiction not in ("fail", "drop", "keep"):
        raise ValueError(
            f'on_contradiction={shown(on_contradiction)}: give "fail", "drop" or "keep"'
        )
    notes: dict[str, Finding] = defaultdict(Finding)
    groups = _by_prompt(_joined(_without_copies(judgements, notes)))
    pairs: list[PreferencePair] = []
    rankings: list[RankedResponses] = []
    for group in groups:
        made = [list(_comparisons(judgement, notes)) for judgement in group]
        circular = _contradictions(list(itertools.chain(*made)), notes)
        unwanted = circular if on_contradiction == "drop" else set()
        for judgement, comparisons in zip(group, made, strict=True):
            pairs += [
                PreferencePair(judgement.prompt, c.better, c.worse, margin=margin)
                for c in comparisons
                if c.key not in unwanted
                for margin in [margin_step * c.difference]
            ]
            keys = {c.key for c in comparisons}
            if not keys:
                continue
            if keys & unwanted or len({*judgement.answers}) < len(judgement.answers):
                _note(notes, LEFT_OUT, judgement.places[0])
            else:
                rankings.append(_ranked(judgement))
    if on_contradiction == "fail":
        _refuse_contradictions(notes)
    found = Comparisons(pairs=pairs, rankings=rankings, findings=dict(notes))
    if not pairs:
        reasons = "; ".join(found.report()) or "there are no judgements"
        raise ValueError(f"no two responses can be compared: {reasons}")
    return found


def _note(notes: dict[str, Finding], what: str, example: str) -> None:
    notes[what].count += 1
    if len(notes[what].examples) < _NUM_EXAMPLES:
        notes[what].examples.append(example)


def _without_copies(
    judgements: Iterable[Judgement], notes: dict[str, Finding]
) -> Iterator[Judgement]:
    first_places: dict[tuple[object, ...], str] = {}
    for judgement in judgements:
        # The order of the responses does not matter.
        graded = sorted(zip(judgement.answers, judgement.grades, strict=True))
        key = (judgement.prompt, judgement.annotator, *graded)
        place = judgement.places[0]
        if key in first_places:
            _note(notes, REPEATED, f"{place}, as at {first_places[key]}")
        else:
            first_places[key] = place
            yield judgement


def _joined(judgements: Iterable[Judgement]) -> list[Judgement]:
    """Merges judgements of single responses by prompt and annotator."""
    single: dict[tuple[str, str | None], list[Judgement]] = defaultdict(list)
    joined: list[Judgement] = []
    for judgement in judgements:
        if len(judgement.answers) == 1:
            single[judgement.prompt, judgement.annotator].append(judgement)
        else:
            joined.append(judgement)
    for (prompt, annotator), parts in single.items():
        joined.append(
            Judgement(
                prompt=prompt,
                answers=tuple(part.answers[0] for part in parts),
                grades=tuple(part.grades[0] for part in parts),
                places=tuple(part.places[0] for part in parts),
                annotator=annotator,
            )
        )
    return joined


def _by_prompt(judgements: Sequence[Judgement]) -> list[list[Judgement]]:
    groups: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.prompt].append(judgement)
        if len(judgement.answers) > MAX_ANSWERS:
            raise ValueError(
                f"{judgement.places[0]}: {len(judgement.answers)} responses to the "
                f"prompt {shown(judgement.prompt)}; give at most {MAX_ANSWERS}"
            )
    return list(groups.values())


def _comparisons(
    judgement: Judgement, notes: dict[str, Finding]
) -> Iterator[_Comparison]:
    if len(judgement.answers) == 1:
        _note(notes, ALONE, judgement.places[0])
    graded = zip(judgement.grades, judgement.answers, judgement.places, strict=True)
    for one, other in itertools.combinations(graded, 2):
        (high, better, _), (low, worse, _) = (
            (other, one) if other[0] > one[0] else (one, other)
        )
        place = one[2] if one[2] == other[2] else f"{one[2]} and {other[2]}"
        if better == worse:
            _note(notes, EQUAL, f"{place}: {shown(better)}")
        elif high == low:
            _note(notes, TIE, f"{place}: {shown(better)} and {shown(worse)}")
        else:
            yield _Comparison(better, worse, high - low, place)


def _contradictions(
    comparisons: list[_Comparison], notes: dict[str, Finding]
) -> set[tuple[str, str]]:
    """The pairs on a cycle: those whose worse response also beats the better one."""
    by_key: dict[tuple[str, str], _Comparison] = {}
    for c in comparisons:
        by_key.setdefault(c.key, c)
    beaten_by: dict[str, list[str]] = defaultdict(list)
    for better, worse in by_key:
        beaten_by[better].append(worse)
    reach = {answer: _reachable(beaten_by, answer) for answer in list(beaten_by)}
    found: set[tuple[str, str]] = set()
    for c in comparisons:
        if c.better not in reach.get(c.worse, ()):
            continue
        found.add(c.key)
        text = f"{c.place}: {shown(c.better)} is preferred to {shown(c.worse)}"
        opposite = by_key.get((c.worse, c.better))
        if opposite is not None:
            _note(notes, REVERSED, f"{text}, at {opposite.place} it is not")
        else:
            step = next(
                by_key[c.worse, answer]
                for answer in beaten_by[c.worse]
                if c.better in reach.get(answer, ())
            )
            _note(notes, CIRCLE, f"{text}, which at {step.place} begins a way back")
    return found


def _reachable(beaten_by: dict[str, list[str]], start: str) -> set[str]:
    """Every response that `start` beats, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = [a for a in beaten_by.get(waiting.pop(), ()) if a not in seen]
        seen.update(new)
        waiting += new
    return seen


def _refuse_contradictions(notes: dict[str, Finding]) -> None:
    found = [notes[what] for what in (REVERSED, CIRCLE) if what in notes]
    if found:
        examples = "; ".join(example for f in found for example in f.examples[:1])
        raise ValueError(
            f"{examples}; {sum(f.count for f in found)} comparisons contradict others: "
            'correct them, remove them with on_contradiction="drop", or train on '
            'all of them with "keep"'
        )


def _ranked(judgement: Judgement) -> RankedResponses:
    graded = zip(judgement.grades, judgement.answers, strict=True)
    ordered = sorted(graded, key=lambda item: -item[0])
    return RankedResponses(
        prompt=judgement.prompt,
        answers=tuple(answer for _, answer in ordered),
        grades=tuple(grade for grade, _ in ordered),
    )

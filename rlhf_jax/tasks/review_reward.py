"""The true reward of a review: the score of a careful reader."""

import collections
import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence

import numpy as np

from rlhf_jax.tasks.review_grammar import Claim, parse_sentence
from rlhf_jax.tasks.review_words import ASPECTS, KINDS, PROMPT_OPENINGS

LOWEST_REWARD = -5.0
HIGHEST_REWARD = 3.9  # every claim is "absolutely superb", no fault

_MIN_SENTENCES, _MAX_SENTENCES = 2, 4
_PROMPT = re.compile(
    rf"(?:{'|'.join(PROMPT_OPENINGS)}) the ({'|'.join(KINDS)}) (?:\S+ )+\S+:"
)


class Fault(enum.Enum):
    """Faults of a review, and the cost of each."""

    UNREADABLE = ("sentence that is none", 1.5)
    UNFINISHED = ("unfinished sentence", 1.5)
    FOREIGN = ("not part of this kind of thing", 1.25)
    REPEATED_SUBJECT = ("judged before", 1.0)
    REPEATED_WORD = ("same opinion word again", 0.5)
    MISFIT = ("word does not suit what it describes", 0.5)
    SLIP = ("small mistake", 0.3)
    TOO_SHORT = (f"sentence missing of {_MIN_SENTENCES}", 1.25)
    TOO_LONG = (f"sentence above {_MAX_SENTENCES}", 0.5)
    NO_VERDICT = ("no verdict", 0.75)
    VERDICT_NOT_LAST = ("verdict is not the last sentence", 0.5)
    CONTRADICTION = ("verdict against everything before it", 0.75)

    def __init__(self, reason: str, cost: float):
        self.reason = reason
        self.cost = cost


@dataclasses.dataclass(frozen=True)
class Appraisal:
    """A reward and its parts."""

    judgements: tuple[tuple[str, float], ...]  # subject and value
    faults: tuple[tuple[Fault, str], ...]  # each with its location in the text

    @property
    def sentiment(self) -> float:
        """Mean value of the judgements, 0 without any."""
        values = [value for _, value in self.judgements]
        return sum(values) / max(len(values), 1)

    @property
    def reward(self) -> float:
        """Sentiment minus the cost of the faults, within the bounds."""
        cost = sum(fault.cost for fault, _ in self.faults)
        return min(max(self.sentiment - cost, LOWEST_REWARD), HIGHEST_REWARD)


def true_reward(prompt: str, response: str) -> float:
    """The quality of a review, from -5 (a list of words) to 3.9 (well-written praise).

        reward = max(mean value of the judgements - Σ cost of the faults, -5)

    The response is parsed sentence by sentence with the grammar of `review_grammar`.
    Each judged aspect, and the verdict, is one judgement, with the grade of its opinion
    word (-3 … 3) times its intensifier; a denial flips the sign and shrinks the value.
    Anything invalid (not a sentence, cut off, not part of this kind of product, judged
    before) is a judgement of value 0, so nonsense dilutes praise in addition to its
    cost. `Fault` lists the costs.

    So the best review has two to four correct positive sentences about different parts
    of the product, in different words, and ends with a consistent verdict. A correct
    negative review gets about -2 to -3.9, a mixed review about 0, "superb superb
    superb" -4.75.

    Args:
        prompt: the prompt, from `make_prompts`; it names the kind of product.
        response: the review. Surrounding white space is ignored.

    Raises:
        ValueError: if the prompt is not a review prompt.
    """
    return appraise(prompt, response).reward


def true_rewards(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """`true_reward` of each pair: `[N]` float64.

    Raises:
        ValueError: if the numbers of prompts and responses differ.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts but {len(responses)} responses; "
            "give one response per prompt"
        )
    return np.array(
        [true_reward(*pair) for pair in zip(prompts, responses, strict=True)],
        dtype=np.float64,
    )


def explain_reward(prompt: str, response: str) -> str:
    """The reward and its parts, one per line, for inspection."""
    appraisal = appraise(prompt, response)
    lines = [f"{response.strip()!r}"]
    lines += [f"  {value:+6.2f}  {what}" for what, value in appraisal.judgements]
    lines.append(f"= {appraisal.sentiment:+6.2f}  mean")
    lines += [
        f"- {fault.cost:6.2f}  {fault.reason}" + (f": {where}" if where else "")
        for fault, where in appraisal.faults
    ]
    lines.append(f"= {appraisal.reward:+6.2f}  true reward")
    return "\n".join(lines)


def prompt_kind(prompt: str) -> str:
    """The kind of product in a prompt.

    Raises:
        ValueError: if the prompt is not a review prompt.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not a review prompt; "
            "expected one like 'Review of the film The Silent Harbour:'"
        )
    return match[1]


def appraise(prompt: str, response: str) -> Appraisal:
    """Judgements and faults of a review; see `true_reward`."""
    kind = prompt_kind(prompt)
    *finished, rest = (part.strip() for part in response.split("."))
    judgements: list[tuple[str, float]] = []
    faults: list[tuple[Fault, str]] = []
    subjects: set[str] = set()
    verdict_at: list[int] = []
    words = collections.Counter()
    for index, text in enumerate(finished):
        sentence = parse_sentence(text)
        if sentence is None:
            judgements.append((repr(text), 0.0))
            faults.append((Fault.UNREADABLE, text))
            continue
        faults += [(Fault.SLIP, slip) for slip in sentence.slips]
        for claim in sentence.claims:
            judgements.append(_judge(claim, kind, subjects, faults))
            words[claim.word] += bool(claim.word)
            verdict_at += [index] * claim.verdict
    if rest:
        judgements.append((repr(rest), 0.0))
        faults.append((Fault.UNFINISHED, rest))
    for word, count in words.items():
        faults += [(Fault.REPEATED_WORD, word)] * (count - 1)
    faults += _faults_of_form(len(finished), verdict_at)
    faults += _contradiction(judgements)
    return Appraisal(tuple(judgements), tuple(faults))


_VERDICT = "verdict"


def _judge(
    claim: Claim, kind: str, subjects: set[str], faults: list[tuple[Fault, str]]
) -> tuple[str, float]:
    """The judgement for a claim; adds its faults to `faults`."""
    subject = _VERDICT if claim.verdict else claim.about
    if claim.about not in ("", kind, *KINDS[kind].aspects):
        faults.append((Fault.FOREIGN, claim.about))
        return subject, 0.0
    if subject in subjects:
        faults.append((Fault.REPEATED_SUBJECT, subject))
        return subject, 0.0
    subjects.add(subject)
    theme = KINDS[kind].theme if claim.verdict else ASPECTS[claim.about].theme
    if claim.theme not in ("any", theme):
        faults.append((Fault.MISFIT, f"{claim.about or 'it'}, {claim.word}"))
    return subject, claim.value


def _faults_of_form(
    num_sentences: int, verdict_at: Sequence[int]
) -> Iterable[tuple[Fault, str]]:
    yield from [(Fault.TOO_SHORT, "")] * (_MIN_SENTENCES - num_sentences)
    yield from [(Fault.TOO_LONG, "")] * (num_sentences - _MAX_SENTENCES)
    if not verdict_at:
        yield Fault.NO_VERDICT, ""
    elif verdict_at[-1] != num_sentences - 1:
        yield Fault.VERDICT_NOT_LAST, ""


def _contradiction(
    judgements: Sequence[tuple[str, float]],
) -> Iterable[tuple[Fault, str]]:
    """A fault if verdict and aspects disagree and neither is near 0."""
    verdicts = [value for what, value in judgements if what == _VERDICT]
    aspects = [value for what, value in judgements if what in ASPECTS]
    if verdicts and aspects:
        mean = sum(aspects) / len(aspects)
        if verdicts[0] * mean < 0 and min(abs(verdicts[0]), abs(mean)) >= 1:
            yield Fault.CONTRADICTION, ""

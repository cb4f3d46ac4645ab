"""A parser of review sentences: what a sentence judges, how, and its mistakes.

    sentence  = [lead-in ","] ( clause [(", but" | "and") clause] | verdict ) "."
    clause    = "the" aspect ("was" | "were" | "seemed" | "felt") opinion
              | "I found the" aspect opinion
    verdict   = ["it was"] ("a" | "an") opinion kind
              | "I" [intensifier] feeling "it"  |  "I did not" feeling "it"
              | "I would" [intention] ("recommend it" | coming-back "again")
    opinion   = ["not" | "never"] [intensifier] adjective

A verdict without a verb ("a superb film") needs a closing lead-in ("Overall, …"). The
language is regular, so regular expressions parse it.
"""

import dataclasses
import math
import re

from rlhf_jax.tasks.review_words import (
    ASPECTS,
    CLOSERS,
    COPULAS,
    DENIABLE_INTENSIFIERS,
    DENIALS,
    FEELING_INTENSIFIERS,
    FEELINGS,
    INTENSIFIERS,
    INTENTIONS,
    KINDS,
    OPENERS,
    OPINIONS,
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One judgement."""

    about: str  # an aspect, a kind, or "" for a verdict that says "it"
    verdict: bool  # judges the product as a whole
    value: float  # -3.9 … 3.9, negation and intensifier included
    word: str  # the opinion word that carries it, "" if none does
    theme: str  # the theme that the word fits, "any" if all


@dataclasses.dataclass(frozen=True)
class Sentence:
    """The parse of a sentence."""

    claims: tuple[Claim, ...]  # one or two
    slips: tuple[str, ...]  # small mistakes that keep the meaning clear


def _any_of(words) -> str:
    return "|".join(re.escape(word) for word in words if word)


_OPINION = (
    rf"(?:(?P<denial>{_any_of(DENIALS)}) )?"
    rf"(?:(?P<intensifier>{_any_of(INTENSIFIERS)}) )?"
    rf"(?P<adjective>{_any_of(OPINIONS)})"
)
_LEAD_IN = re.compile(rf"({_any_of(OPENERS + CLOSERS)}), (.+)")
_JOINED = re.compile(r"(.+?)(, but| and) (.+)")
_CLAUSE = re.compile(
    rf"(?P<found>i found )?the (?P<about>{_any_of(ASPECTS)})"
    rf"(?(found)| (?P<copula>{_any_of(COPULAS)})) {_OPINION}"
)
_SUMMARY = re.compile(
    rf"(?P<it_was>it was )?(?P<article>an?) {_OPINION} (?P<about>{_any_of(KINDS)})"
)
_FEELING = re.compile(
    rf"i (?:(?P<intensifier>{_any_of(FEELING_INTENSIFIERS)}) )?"
    rf"(?P<feeling>{_any_of(FEELINGS)}) it"
)
_FEELING_DENIED = re.compile(
    rf"i did not (?P<bare>{_any_of(bare for bare, _ in FEELINGS.values())}) it"
)
_INTENTION = re.compile(
    rf"i would (?:(?P<intention>{_any_of(INTENTIONS)}) )?"
    rf"(?:recommend it|(?P<again>{_any_of(k.again for k in KINDS.values())}) again)"
)
_KIND_OF_RETURN = {kind.again: name for name, kind in KINDS.items()}
_FEELING_OF_BARE = {bare: past for past, (bare, _) in FEELINGS.items()}


def opinion_value(denial: str | None, intensifier: str | None, grade: int) -> float:
    """The value of `[denial] [intensifier] adjective`, within ±3.9.

    An intensifier multiplies the grade g. A denial flips the sign and shrinks the
    value: v becomes -sign(v)·(1.25 - |v|/4), times 1.5 for "never". So "not bad" is
    mild praise (0.75), and "not superb" (-0.5) denies less than "not good" (-0.75)
    does.
    """
    value = grade * (INTENSIFIERS[intensifier].factor if intensifier else 1.0)
    if not denial or not value:
        return value
    return -math.copysign(1.25 - abs(value) / 4, value) * DENIALS[denial]


def idiomatic(denial: str | None, intensifier: str | None, grade: int) -> bool:
    """Whether the combination is idiomatic: "very good" and "not very good", not "very
    superb"."""
    if intensifier is None:
        return True
    if denial and intensifier not in DENIABLE_INTENSIFIERS:
        return False
    return grade in INTENSIFIERS[intensifier].grades


def parse_sentence(text: str) -> Sentence | None:
    """Claims and slips of a sentence without its period; None if it does not parse.

    Slips are a wrong capital, "was" for "were", "a" for "an", an intensifier that does
    not fit its adjective, and a wrong "and" or "but".
    """
    words = " ".join(text.split())
    slips = [] if words == write_out(words) else ["capital letter"]
    words = words.lower()
    closed = False
    if match := _LEAD_IN.fullmatch(words):
        closed, words = match[1] in CLOSERS, match[2]
    if verdict := _parse_verdict(words, closed, slips):
        return Sentence((verdict,), tuple(slips))

    joined = _JOINED.fullmatch(words)
    clauses = (joined[1], joined[3]) if joined else (words,)
    parsed = [_parse_clause(clause, slips) for clause in clauses]
    claims = tuple(claim for claim in parsed if claim is not None)
    if len(claims) < len(clauses):
        return None
    if joined:
        product = claims[0].value * claims[1].value
        if product < 0 if joined[2] == " and" else product > 0:
            slips.append(f"{joined[2].strip(', ')} against the sense")
    return Sentence(claims, tuple(slips))


def write_out(words: str) -> str:
    """Capitalizes a sentence: the first letter, and the word "I"."""
    words = re.sub(r"\bi\b", "I", words.lower())
    return words[:1].upper() + words[1:]


def _parse_clause(words: str, slips: list[str]) -> Claim | None:
    match = _CLAUSE.fullmatch(words)
    if match is None:
        return None
    plural = COPULAS[match["copula"]] if match["copula"] else None
    if plural is not None and plural != ASPECTS[match["about"]].plural:
        slips.append(f"{match['about']} {match['copula']}")
    return _opinion_claim(match, slips, verdict=False)


def _parse_verdict(words: str, closed: bool, slips: list[str]) -> Claim | None:
    if match := _SUMMARY.fullmatch(words):
        if not (closed or match["it_was"]):
            return None
        article, following = words.removeprefix("it was ").split(" ")[:2]
        if article != indefinite_article(following):
            slips.append(f"{article} {following}")
        return _opinion_claim(match, slips, verdict=True)
    if match := _FEELING.fullmatch(words):
        bare, grade = FEELINGS[match["feeling"]]
        value = opinion_value(None, match["intensifier"], grade)
        if not idiomatic(None, match["intensifier"], grade):
            slips.append(f"{match['intensifier']} {match['feeling']}")
        return Claim("", True, value, bare, "any")
    if match := _FEELING_DENIED.fullmatch(words):
        _, grade = FEELINGS[_FEELING_OF_BARE[match["bare"]]]
        return Claim("", True, opinion_value("not", None, grade), match["bare"], "any")
    if match := _INTENTION.fullmatch(words):
        about = _KIND_OF_RETURN[match["again"]] if match["again"] else ""
        return Claim(about, True, INTENTIONS[match["intention"] or ""], "", "any")
    return None


def indefinite_article(following: str) -> str:
    """ "a" or "an", by the first letter of the next word."""
    return "an" if following[0] in "aeiou" else "a"


def _opinion_claim(match: re.Match, slips: list[str], *, verdict: bool) -> Claim:
    denial, intensifier = match["denial"], match["intensifier"]
    opinion = OPINIONS[match["adjective"]]
    if not idiomatic(denial, intensifier, opinion.grade):
        slips.append(f"{intensifier} {match['adjective']}")
    value = opinion_value(denial, intensifier, opinion.grade)
    return Claim(match["about"], verdict, value, match["adjective"], opinion.theme)

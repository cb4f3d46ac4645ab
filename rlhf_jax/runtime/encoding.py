"""Token ids of prompts, examples and preferences, none longer than a limit.

Prompt and answer are encoded apart: the tokens of a prompt are then the same in
training and before generation, whatever follows it.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from rlhf_jax.runtime.comparisons import RankedAnswers
from rlhf_jax.runtime.row_files import shown
from rlhf_jax.runtime.row_forms import Example, PreferencePair

Overlong = Literal["drop", "truncate", "fail"]
T = TypeVar("T")

_WIDTH_MULTIPLE = 16  # memory tiles of accelerators are multiples of 8 or 16


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def __call__(
        self, texts: list[str], /, *, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        """A mapping whose `"input_ids"` is one list of ids per text."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """Prompt, completion and EOS."""

    tokens: np.ndarray  # [L] int32
    prompt_length: int  # tokens that come before those to be learnt


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """One prompt with either of two answers, each with EOS."""

    chosen: np.ndarray  # [L] int32
    rejected: np.ndarray  # [L'] int32
    margin: float = 0.0  # by how much their scores should differ


@dataclasses.dataclass(frozen=True)
class EncodedRanking:
    """One prompt with each of several answers, best first, each with EOS."""

    answers: list[np.ndarray]  # K of [L] int32
    grades: tuple[float, ...]  # K, falling; equal ones are a tie


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded(Generic[T]):
    """The rows of one data set as token ids."""

    rows: list[T]
    sources: list[int]  # for each row, the index of the input that it came from
    width: int  # to pad every batch to: the longest row, rounded up within the limit
    dropped: int  # inputs left out because they were too long
    truncated: int  # inputs whose prompt lost its beginning


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    bos_id: int | None = None,
    overlong: Overlong = "drop",
) -> Encoded[np.ndarray]:
    """Token ids of prompts, `[L]` int32 each, 1 ≤ L ≤ `max_prompt_tokens`.

    Args:
        prompts: texts.
        tokenizer: called without special tokens, which chat templates write as text.
        max_prompt_tokens: the limit, at least 1.
        bos_id: begins every prompt that does not begin with it already; None: no BOS.
        overlong: "drop" leaves longer prompts out, "truncate" keeps the end of each
            (and BOS), "fail" refuses them.

    Raises:
        ValueError: for a prompt without tokens, for too long prompts under "fail", and
            where no prompt is left.
    """
    ids = _encode(prompts, tokenizer, bos_id)
    for index, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(
                f"prompt {index}, {shown(prompts[index])}, has no tokens; generation "
                "needs at least one to begin with"
            )
    limit = _Limit("max_prompt_tokens", max_prompt_tokens, 1, overlong, bos_id)
    fitted = limit.fit(ids, [0] * len(ids), "prompts")
    rows = [[] if kept is None else [_int32(kept)] for kept in fitted]
    return _encoded(rows, [len(row) for row in _flat(rows)], ids, fitted, limit)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    eos_id: int,
    bos_id: int | None = None,
    overlong: Overlong = "drop",
) -> Encoded[EncodedExample]:
    """Token ids of prompt, completion and EOS, none longer than `max_tokens`.

    A completion that ends with EOS, as from some chat templates, gets no second one.

    Plain text, an example without a prompt, is never too long: it is cut into windows
    of `max_tokens`. Each begins with the last token of the one before it, as context
    that is not learnt again. So every token is learnt once, except the first of the
    text, which nothing precedes.

    Args:
        examples: texts.
        tokenizer: called without special tokens.
        max_tokens: the limit for prompt, completion and EOS together, at least 2.
        eos_id: ends every completion and every plain text.
        bos_id: begins every example that does not begin with it already; None: no BOS.
        overlong: "drop" leaves longer examples out; "truncate" cuts the beginning of
            the prompt (after BOS), but leaves out what has no room for one prompt
            token, for a completion cut short would teach to stop in the middle; "fail"
            refuses them.

    Raises:
        ValueError: for too long examples under "fail", and where no example is left.
    """
    prompts = _encode([example.prompt for example in examples], tokenizer, bos_id)
    completions = _encode_answers(
        [example.completion for example in examples], tokenizer, eos_id
    )
    is_plain = [not example.prompt for example in examples]
    lengths = [
        0 if plain else len(completion)
        for plain, completion in zip(is_plain, completions, strict=True)
    ]
    limit = _Limit("max_tokens", max_tokens, 2, overlong, bos_id)
    fitted = limit.fit(prompts, lengths, "examples")
    rows: list[list[EncodedExample]] = []
    for prompt, completion, plain in zip(fitted, completions, is_plain, strict=True):
        if prompt is None:
            rows.append([])
        elif plain:
            rows.append(_windows(prompt, completion, max_tokens))
        else:
            rows.append([EncodedExample(_int32(prompt + completion), len(prompt))])
    longest = [len(row.tokens) for row in _flat(rows)]
    return _encoded(rows, longest, prompts, fitted, limit)


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    eos_id: int,
    bos_id: int | None = None,
    overlong: Overlong = "drop",
) -> Encoded[EncodedPair]:
    """Token ids of prompt, answer and EOS for both answers of each pair.

    Args:
        pairs: texts.
        tokenizer: called without special tokens.
        max_tokens: the limit for the prompt, the longer answer and EOS together, at
            least 2.
        eos_id: ends every answer that does not end with it already.
        bos_id: begins every prompt that does not begin with it already; None: no BOS.
        overlong: "drop" leaves longer pairs out; "truncate" cuts the beginning of the
            prompt (after BOS), the same for both answers, but leaves out what has no
            room for one prompt token, for nobody judged an answer cut short; "fail"
            refuses them.

    Raises:
        ValueError: for too long pairs under "fail", and where no pair is left.
    """
    prompts = _encode([pair.prompt for pair in pairs], tokenizer, bos_id)
    chosen = _encode_answers([pair.chosen for pair in pairs], tokenizer, eos_id)
    rejected = _encode_answers([pair.rejected for pair in pairs], tokenizer, eos_id)
    lengths = [max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
    limit = _Limit("max_tokens", max_tokens, 2, overlong, bos_id)
    fitted = limit.fit(prompts, lengths, "pairs")
    rows = [
        []
        if prompt is None
        else [EncodedPair(_int32(prompt + a), _int32(prompt + b), pair.margin)]
        for pair, prompt, a, b in zip(pairs, fitted, chosen, rejected, strict=True)
    ]
    longest = [max(len(row.chosen), len(row.rejected)) for row in _flat(rows)]
    return _encoded(rows, longest, prompts, fitted, limit)


def encode_rankings(
    rankings: Sequence[RankedAnswers],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    eos_id: int,
    bos_id: int | None = None,
    overlong: Overlong = "drop",
) -> Encoded[EncodedRanking]:
    """Token ids of prompt, answer and EOS for every answer of each ranking.

    Args:
        rankings: texts.
        tokenizer: called without special tokens.
        max_tokens: the limit for the prompt, the longest answer and EOS together, at
            least 2.
        eos_id: ends every answer that does not end with it already.
        bos_id: begins every prompt that does not begin with it already; None: no BOS.
        overlong: as of `encode_pairs`, for a ranking as a whole.

    Raises:
        ValueError: for too long rankings under "fail", and where none is left.
    """
    prompts = _encode([ranking.prompt for ranking in rankings], tokenizer, bos_id)
    texts = [answer for ranking in rankings for answer in ranking.answers]
    encoded = iter(_encode_answers(texts, tokenizer, eos_id))
    answers = [list(itertools.islice(encoded, len(r.answers))) for r in rankings]
    lengths = [max(map(len, some)) for some in answers]
    limit = _Limit("max_tokens", max_tokens, 2, overlong, bos_id)
    fitted = limit.fit(prompts, lengths, "rankings")
    rows = [
        []
        if prompt is None
        else [EncodedRanking([_int32(prompt + a) for a in some], ranking.grades)]
        for ranking, prompt, some in zip(rankings, fitted, answers, strict=True)
    ]
    longest = [max(map(len, row.answers)) for row in _flat(rows)]
    return _encoded(rows, longest, prompts, fitted, limit)


@dataclasses.dataclass(frozen=True)
class _Limit:
    """How long a row may be, and what happens to longer ones."""

    option: str
    tokens: int
    least: int
    overlong: Overlong
    bos_id: int | None

    def fit(
        self, prompts: list[list[int]], answer_lengths: list[int], what: str
    ) -> list[list[int] | None]:
        """Prompts that leave room for their answers; None for rows to leave out."""
        if self.tokens < self.least:
            raise ValueError(f"{self.option}={self.tokens}: at least {self.least}")
        if self.overlong not in ("drop", "truncate", "fail"):
            raise ValueError(
                f'overlong={shown(self.overlong)}: give "drop", "truncate" or "fail"'
            )
        lengths = [len(p) + n for p, n in zip(prompts, answer_lengths, strict=True)]
        too_long = [i for i, length in enumerate(lengths) if length > self.tokens]
        found = (
            f"{self.option}={self.tokens}: {len(too_long)} of {len(prompts)} {what} "
            f"are longer, the longest has {max(lengths)} tokens"
        )
        if too_long and self.overlong == "fail":
            raise ValueError(
                f'{found}; raise {self.option}, or set overlong to "drop" or "truncate"'
            )
        fitted: list[list[int] | None] = list(prompts)
        for i in too_long:
            room = self.tokens - answer_lengths[i]
            keeps = self.overlong == "truncate"
            fitted[i] = self._keep_end(prompts[i], room) if keeps else None
        if all(kept is None for kept in fitted):
            raise ValueError(f"{found} and none is left; raise {self.option}")
        return fitted

    def _keep_end(self, prompt: list[int], room: int) -> list[int] | None:
        """BOS and the last tokens; None where there is no room for one of them."""
        begin = [] if self.bos_id is None else [self.bos_id]
        kept = room - len(begin)
        return begin + prompt[-kept:] if kept >= 1 else None


def _encode(
    texts: Sequence[str], tokenizer: Tokenizer, bos_id: int | None
) -> list[list[int]]:
    if not texts:
        raise ValueError("there is nothing to encode: the data set has no rows")
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if bos_id is None:
        return [list(row) for row in ids]
    return [list(row) if row[:1] == [bos_id] else [bos_id, *row] for row in ids]


def _encode_answers(
    texts: Sequence[str], tokenizer: Tokenizer, eos_id: int
) -> list[list[int]]:
    ids = _encode(texts, tokenizer, bos_id=None)
    return [row if row[-1:] == [eos_id] else [*row, eos_id] for row in ids]


def _windows(
    prompt: list[int], text: list[int], max_tokens: int
) -> list[EncodedExample]:
    """Plain text in pieces; `prompt` is BOS alone or nothing."""
    tokens = prompt + text
    starts = range(0, max(len(tokens) - 1, 1), max_tokens - 1)
    return [
        EncodedExample(_int32(tokens[start : start + max_tokens]), 1)
        if start
        else EncodedExample(_int32(tokens[:max_tokens]), len(prompt))
        for start in starts
    ]


def _encoded(
    rows: list[list[T]],
    lengths: list[int],
    prompts: list[list[int]],
    fitted: list[list[int] | None],
    limit: _Limit,
) -> Encoded[T]:
    rounded = -(-max(lengths) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    pairs = zip(prompts, fitted, strict=True)
    return Encoded(
        rows=_flat(rows),
        sources=[source for source, some in enumerate(rows) for _ in some],
        width=min(rounded, limit.tokens),
        dropped=sum(kept is None for kept in fitted),
        truncated=sum(
            kept is not None and len(kept) < len(prompt) for prompt, kept in pairs
        ),
    )


def _flat(rows: list[list[T]]) -> list[T]:
    return list(itertools.chain.from_iterable(rows))


def _int32(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)

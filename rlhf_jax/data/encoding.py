"""Token ids of prompts, examples and preferences, within a length limit."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import numpy as np

from rlhf_jax.data.comparisons import RankedResponses
from rlhf_jax.data.dialogues import Span
from rlhf_jax.data.row_forms import Example, PreferencePair
from rlhf_jax.data.text_encoder import TextEncoder
from rlhf_jax.files.printable import shown

Overlong = Literal["drop", "truncate", "fail"]
T = TypeVar("T")

_WIDTH_MULTIPLE = 16  # memory tiles of accelerators are multiples of 8 or 16


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """Prompt, completion and EOS, and which of these tokens are trained on."""

    tokens: np.ndarray  # [L] int32
    learnt: np.ndarray  # [L] bool


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """One prompt with each of two responses, both with EOS."""

    chosen: np.ndarray  # [L] int32
    rejected: np.ndarray  # [L'] int32
    margin: float = 0.0  # target difference of their scores
    prompt_length: int = 0  # length of the shared prompt


@dataclasses.dataclass(frozen=True)
class EncodedRanking:
    """One prompt with each of several responses, best first, each with EOS."""

    answers: list[np.ndarray]  # K of [L] int32
    grades: tuple[float, ...]  # K, descending; equal grades are ties


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded(Generic[T]):
    """The rows of a dataset as token ids."""

    rows: list[T]
    sources: list[int]  # for each row, the index of its input
    width: int  # padded width of all batches: the longest row, rounded up
    dropped: int  # inputs dropped because they were too long
    truncated: int  # inputs whose prompt was truncated on the left
    answers_cut: int = 0  # earlier responses not trained on because of it


def encode_prompts(
    prompts: Sequence[str],
    encoder: TextEncoder,
    *,
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
) -> Encoded[np.ndarray]:
    """Token ids of prompts, `[L]` int32 each, 1 ≤ L ≤ `max_prompt_tokens`.

    Args:
        prompts: texts.
        encoder: of the model.
        max_prompt_tokens: the limit, at least 1.
        overlong: "drop" drops longer prompts, "truncate" keeps the end of each (and
            BOS), "fail" raises.

    Raises:
        ValueError: for a prompt without tokens, for too long prompts under "fail", or
            if no prompt is left.
    """
    ids = encoder.prompts(prompts)
    for index, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(
                f"prompt {index}, {shown(prompts[index])}, has no tokens; give at "
                "least one"
            )
    limit = _Limit("max_prompt_tokens", max_prompt_tokens, 1, overlong, encoder)
    fitted = limit.fit(ids, [0] * len(ids), "prompts")
    rows = [[] if kept is None else [_int32(kept)] for kept in fitted]
    return _encoded(rows, [len(row) for row in _flat(rows)], ids, fitted, limit)


def encode_examples(
    examples: Sequence[Example],
    encoder: TextEncoder,
    *,
    max_tokens: int,
    overlong: Overlong = "drop",
) -> Encoded[EncodedExample]:
    """Token ids of prompt, completion and EOS, none longer than `max_tokens`.

    EOS is not appended to a completion that already ends with one of the encoder's end
    ids, as from some chat templates. The completion with its EOS is trained on, and so
    are the earlier responses listed in the example.

    Plain text, an example without a prompt, is never too long: it is split into windows
    of `max_tokens`. Each window begins with the last token of the previous one, as
    context only. So every token is trained on once, except the first of the text.

    Args:
        examples: texts.
        encoder: of the model.
        max_tokens: the limit for prompt, completion and EOS together, at least 2.
        overlong: "drop" drops longer examples; "truncate" cuts the beginning of the
            prompt (after BOS), but drops examples with no room for one prompt token,
            because a truncated completion would teach the model to stop early; "fail"
            raises. An earlier response is trained on only if it is complete and at
            least one token precedes it; the others are counted.

    Raises:
        ValueError: for too long examples under "fail", or if no example is left.
    """
    texts = [example.prompt for example in examples]
    prompts = encoder.prompts(texts)
    completions = encoder.answers(
        [example.completion for example in examples], texts, prompts
    )
    spans = encoder.token_spans(
        texts, prompts, [example.earlier_answers for example in examples]
    )
    lengths = [
        len(completion) if text else 0
        for text, completion in zip(texts, completions, strict=True)
    ]
    limit = _Limit("max_tokens", max_tokens, 2, overlong, encoder)
    fitted = limit.fit(prompts, lengths, "examples")
    rows: list[list[EncodedExample]] = []
    answers_cut = 0
    for i, (kept, completion) in enumerate(zip(fitted, completions, strict=True)):
        if kept is None:
            rows.append([])
        elif not texts[i]:
            rows.append(_windows(kept, completion, max_tokens))
        else:
            left = limit.spans_left(spans[i], prompts[i], kept)
            answers_cut += len(spans[i]) - len(left)
            rows.append([_example(kept + completion, [*left, (len(kept), None)])])
    longest = [len(row.tokens) for row in _flat(rows)]
    encoded = _encoded(rows, longest, prompts, fitted, limit)
    return dataclasses.replace(encoded, answers_cut=answers_cut)


def encode_pairs(
    pairs: Sequence[PreferencePair],
    encoder: TextEncoder,
    *,
    max_tokens: int,
    overlong: Overlong = "drop",
) -> Encoded[EncodedPair]:
    """Token ids of prompt, response and EOS for both responses of each pair.

    Args:
        pairs: texts.
        encoder: of the model; adds EOS to responses without one.
        max_tokens: the limit for the prompt, the longer response and EOS together, at
            least 2.
        overlong: "drop" drops longer pairs; "truncate" cuts the beginning of the prompt
            (after BOS), the same for both responses, but drops pairs with no room for
            one prompt token, because nobody judged truncated responses; "fail" raises.

    Raises:
        ValueError: for too long pairs under "fail", or if no pair is left.
    """
    texts = [pair.prompt for pair in pairs]
    prompts = encoder.prompts(texts)
    chosen = encoder.answers([pair.chosen for pair in pairs], texts, prompts)
    rejected = encoder.answers([pair.rejected for pair in pairs], texts, prompts)
    lengths = [max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
    limit = _Limit("max_tokens", max_tokens, 2, overlong, encoder)
    fitted = limit.fit(prompts, lengths, "pairs")
    rows = [
        []
        if prompt is None
        else [
            EncodedPair(
                _int32(prompt + a),
                _int32(prompt + b),
                margin=pair.margin,
                prompt_length=len(prompt),
            )
        ]
        for pair, prompt, a, b in zip(pairs, fitted, chosen, rejected, strict=True)
    ]
    longest = [max(len(row.chosen), len(row.rejected)) for row in _flat(rows)]
    return _encoded(rows, longest, prompts, fitted, limit)


def encode_rankings(
    rankings: Sequence[RankedResponses],
    encoder: TextEncoder,
    *,
    max_tokens: int,
    overlong: Overlong = "drop",
) -> Encoded[EncodedRanking]:
    """Token ids of prompt, response and EOS for every response of each ranking.

    Args:
        rankings: texts.
        encoder: of the model; adds EOS to responses without one.
        max_tokens: the limit for the prompt, the longest response and EOS together, at
            least 2.
        overlong: as in `encode_pairs`, for a ranking as a whole.

    Raises:
        ValueError: for too long rankings under "fail", or if none is left.
    """
    texts = [ranking.prompt for ranking in rankings]
    prompts = encoder.prompts(texts)
    counts = [len(ranking.answers) for ranking in rankings]
    encoded = iter(
        encoder.answers(
            [answer for ranking in rankings for answer in ranking.answers],
            _repeated(texts, counts),
            _repeated(prompts, counts),
        )
    )
    answers = [list(itertools.islice(encoded, count)) for count in counts]
    lengths = [max(map(len, some)) for some in answers]
    limit = _Limit("max_tokens", max_tokens, 2, overlong, encoder)
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
    """The maximum length of a row, and what to do with longer ones."""

    option: str
    tokens: int
    least: int
    overlong: Overlong
    encoder: TextEncoder

    def fit(
        self, prompts: list[list[int]], answer_lengths: list[int], what: str
    ) -> list[list[int] | None]:
        """Prompts that leave room for their responses; None for rows to drop."""
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
            f"are longer; the longest has {max(lengths)} tokens"
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
        """BOS and the last tokens; None if there is no room for one of them."""
        kept = room - len(self._begin)
        return self._begin + prompt[-kept:] if kept >= 1 else None

    def spans_left(
        self, spans: list[Span], prompt: list[int], kept: list[int]
    ) -> list[Span]:
        """The spans of a truncated prompt that are complete and have some context.

        BOS alone does not count as context.
        """
        cut = len(prompt) - len(kept)
        first = len(self._begin) if cut else -1
        moved = [(begin - cut, end - cut) for begin, end in spans]
        return [(begin, end) for begin, end in moved if begin > first]

    @property
    def _begin(self) -> list[int]:
        return [] if self.encoder.bos_id is None else [self.encoder.bos_id]


def _example(
    tokens: list[int], spans: Sequence[tuple[int, int | None]]
) -> EncodedExample:
    """Tokens, with those in the spans trained on; None: up to the end."""
    learnt = np.zeros(len(tokens), bool)
    for begin, end in spans:
        learnt[begin:end] = True
    return EncodedExample(_int32(tokens), learnt)


def _windows(
    prompt: list[int], text: list[int], max_tokens: int
) -> list[EncodedExample]:
    """Splits plain text into windows; `prompt` is BOS or empty."""
    tokens = prompt + text
    starts = range(0, max(len(tokens) - 1, 1), max_tokens - 1)
    return [
        _example(
            tokens[start : start + max_tokens], [(1 if start else len(prompt), None)]
        )
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


def _repeated(items: Sequence[T], counts: Sequence[int]) -> list[T]:
    """Repeats each item by its count."""
    return [x for x, n in zip(items, counts, strict=True) for _ in range(n)]


def _int32(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)

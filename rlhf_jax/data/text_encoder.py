"""Encodes prompts and responses as token ids.

The tokens of a prompt depend only on its text, so they are the same in training and
before generation. The tokens of a response are what it adds to them. If no token
crosses the boundary, these are the tokens of the joint text after those of the prompt;
encoding the response alone would add a space with tokenizers that prepend one, and
would not strip white space next to special tokens with tokenizers that do. If a token
crosses the boundary, the response is encoded separately.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rlhf_jax.data.dialogues import Span
from rlhf_jax.files.printable import shown


class Tokenizer(Protocol):
    """The part of the Hugging Face tokenizer interface used here."""

    def __call__(
        self, texts: list[str], /, *, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        """A mapping whose `"input_ids"` has one list of ids per text."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer and its BOS and end ids."""

    tokenizer: Tokenizer  # called without adding special tokens
    eos_id: int  # appended to responses without an end id
    bos_id: int | None = None  # prepended once to every sequence; None: no BOS
    end_ids: frozenset[int] = frozenset()  # other ids that end a response
    num_ids: int | None = None  # number of embeddings of the model; None: no check

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, each with one BOS if there is one.

        Raises:
            ValueError: if there are no texts, or a token has no embedding in the model.
        """
        return [self._begun(row) for row in self._ids(texts)]

    def answers(
        self,
        answers: Sequence[str],
        prompts: Sequence[str],
        prompt_ids: Sequence[list[int]],
    ) -> list[list[int]]:
        """Token ids of responses as they follow their prompts, each with one end id.

        Args:
            answers: N texts.
            prompts: N texts, "" for none.
            prompt_ids: their encoding by `self.prompts`.
        """
        apart = self._ids(answers)
        follow = [i for i, prompt in enumerate(prompts) if prompt]
        joint = self._ids([prompts[i] + answers[i] for i in follow]) if follow else []
        for i, ids in zip(follow, joint, strict=True):
            whole, before = self._begun(ids), prompt_ids[i]
            if whole[: len(before)] == before:
                apart[i] = whole[len(before) :]
        ends = {self.eos_id, *self.end_ids}
        return [
            row if row and row[-1] in ends else [*row, self.eos_id] for row in apart
        ]

    def token_spans(
        self,
        texts: Sequence[str],
        ids: Sequence[list[int]],
        spans: Sequence[Sequence[Span]],
    ) -> list[list[Span]]:
        """Converts character spans of each text to token spans.

        A token that is only partly in a span is excluded.

        Args:
            texts: N texts.
            ids: their encoding by `self.prompts`.
            spans: of each text, any number, from left to right, not overlapping.

        Returns:
            The same number of token spans; they may be empty.
        """
        edges = [[0, *itertools.chain(*some)] if some else [] for some in spans]
        pieces = [
            [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]
            for text, cuts in zip(texts, edges, strict=True)
        ]
        flat = list(itertools.chain(*pieces))
        encoded = iter(self._ids(flat) if flat else [])
        found = []
        for text, row, some, parts in zip(texts, ids, spans, pieces, strict=True):
            alone = [next(encoded) for _ in parts]
            joined = list(itertools.chain(*alone))
            if some and self._begun(joined) == row:  # no token crosses a cut
                added = len(row) - len(joined)  # BOS
                at = [added + n for n in itertools.accumulate(map(len, alone))]
                # The last piece, after the last span, ends the row.
                found.append(list(zip(at[:-1:2], at[1::2], strict=True)))
            else:
                found.append([self._token_span(text, row, span) for span in some])
        return found

    def _token_span(self, text: str, row: list[int], span: Span) -> Span:
        """The complete tokens in a span, found by encoding the text before each of its
        ends."""
        begin, end = span
        before, through, after = self._ids([text[:begin], text[:end], text[begin:]])
        before, through = self._begun(before), self._begun(through)
        first = _common(before, row)
        if first < len(before):  # a token crosses the start: begin after it
            first = max(first, len(row) - _common(after[::-1], row[::-1]))
        return first, max(first, _common(through, row))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            raise ValueError("nothing to encode: the dataset has no rows")
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [list(row) for row in ids]
        if self.num_ids is not None:
            self._check_known(texts, rows, self.num_ids)
        return rows

    def _check_known(
        self, texts: Sequence[str], rows: list[list[int]], num_ids: int
    ) -> None:
        for text, row in zip(texts, rows, strict=True):
            if row and max(row) >= num_ids:
                raise ValueError(
                    f"the text {shown(text)} has the token {max(row)}, but the model "
                    f"has only {num_ids} embeddings; remove such texts"
                )

    def _begun(self, row: list[int]) -> list[int]:
        if self.bos_id is None or row[:1] == [self.bos_id]:
            return row
        return [self.bos_id, *row]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))

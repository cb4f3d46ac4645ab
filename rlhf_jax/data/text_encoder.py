"""Text to token ids: which are a prompt's, which an answer's, and what ends an answer.

The tokens of a prompt are those of its text alone, whatever follows it: the same in
training and before generation. Those of an answer are what it adds to them. Where no
token crosses the border, that is what the text of both has after the prompt's tokens;
tokenizers that put a space before every text would otherwise put one between the two,
and those that strip white space beside a special token would not strip it there. Where
a token crosses it, the answer is encoded apart.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rlhf_jax.data.dialogues import Span
from rlhf_jax.data.row_files import shown


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def __call__(
        self, texts: list[str], /, *, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        """A mapping whose `"input_ids"` is one list of ids per text."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A tokenizer and the ids at which sequences begin and answers end."""

    tokenizer: Tokenizer  # called without special tokens, which templates write as text
    eos_id: int  # ends an answer that no id of the model's ends already
    bos_id: int | None = None  # begins every sequence, once; None: no BOS
    end_ids: frozenset[int] = frozenset()  # end an answer as well as `eos_id` does
    num_ids: int | None = None  # the model knows the ids below it; None: all

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, each with one BOS where there is one.

        Raises:
            ValueError: there are no texts, or one has a token that the model has no
                embedding for.
        """
        return [self._begun(row) for row in self._ids(texts)]

    def answers(
        self,
        answers: Sequence[str],
        prompts: Sequence[str],
        prompt_ids: Sequence[list[int]],
    ) -> list[list[int]]:
        """Token ids of answers as they follow their prompts, each with one end.

        Args:
            answers: N texts.
            prompts: N texts, "" for none.
            prompt_ids: what `self.prompts` makes of them.
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
        """Which tokens of each text its spans of characters are.

        A token that belongs only in part to a span is left out of it.

        Args:
            texts: N texts.
            ids: what `self.prompts` makes of them.
            spans: of each text, any number, from left to right, none overlapping.

        Returns:
            As many spans, of tokens; one may be empty.
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
        """The whole tokens within a span, by the text before each of its ends."""
        begin, end = span
        before, through, after = self._ids([text[:begin], text[:end], text[begin:]])
        before, through = self._begun(before), self._begun(through)
        first = _common(before, row)
        if first < len(before):  # a token crosses the begin: go on after it
            first = max(first, len(row) - _common(after[::-1], row[::-1]))
        return first, max(first, _common(through, row))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            raise ValueError("there is nothing to encode: the data set has no rows")
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
                    f"has embeddings for {num_ids} only; leave such texts out"
                )

    def _begun(self, row: list[int]) -> list[int]:
        if self.bos_id is None or row[:1] == [self.bos_id]:
            return row
        return [self.bos_id, *row]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common from their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))

"""Selects the rows of each batch and pads them into one record.

Everything here is NumPy on the host; the caller moves batches to devices. All batches
of a dataset are padded to the same width, so nothing is recompiled. Masks are computed
from lengths: the pad id may be EOS, and may occur within a prompt.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import numpy as np

from rlhf_jax.algo.types import (
    Array,
    Demonstrations,
    Preferences,
    Prompts,
    Rankings,
    Sequences,
)
from rlhf_jax.data.encoding import EncodedExample, EncodedPair, EncodedRanking

Row = TypeVar("Row")
Batch = TypeVar("Batch")


class Batches(Generic[Row, Batch]):
    """`batches[step]` for every step from 0, deterministic.

    A run resumes from its next step number. Epochs repeat indefinitely, each with its
    own order, which depends only on seed and epoch. An epoch has `steps_per_epoch` full
    batches; its last `left_out` rows are dropped until the next epoch.
    """

    steps_per_epoch: int
    left_out: int

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[list[Row]], Batch],
        *,
        batch_size: int,
        seed: int | None,
        stream: int = 0,
    ):
        """Prepares the order; reads no rows yet.

        Args:
            rows: the dataset; only `len(rows)` and `rows[i]` are used.
            collate: makes one batch of `batch_size` rows.
            batch_size: rows per batch.
            seed: for shuffling, at least 0; None keeps the order of `rows`.
            stream: selects an independent shuffle for the same seed.

        Raises:
            ValueError: if the rows do not fill one batch, or the seed is negative.
        """
        if not 1 <= batch_size <= len(rows):
            raise ValueError(
                f"batch_size={batch_size}: the dataset has {len(rows)} rows; give a "
                f"batch size between 1 and that"
            )
        _check_seed(seed)
        self._rows = rows
        self._collate = collate
        self._batch_size = batch_size
        self._seed = seed
        self._stream = stream
        self.steps_per_epoch, self.left_out = divmod(len(rows), batch_size)

    def indices(self, step: int) -> np.ndarray:
        """`[batch_size]`, indices into `rows` of batch `step`."""
        step = operator.index(step)
        if step < 0:
            raise IndexError(f"step {step}: steps start at 0")
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self._batch_size
        if self._seed is None:
            return np.arange(begin, begin + self._batch_size)
        order = _order(len(self._rows), self._seed, epoch, self._stream)
        return order[begin : begin + self._batch_size]

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`."""
        return self._collate([self._rows[int(i)] for i in self.indices(step)])


def holdout(
    rows: Sequence[Row], fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Splits rows into training and held-out rows.

    The split depends only on seed, fraction and the number of rows. Both parts keep the
    order of `rows`.

    Args:
        rows: the dataset.
        fraction: of the rows to hold out, in [0, 1); 0 holds out none.
        seed: for the selection, at least 0.

    Returns:
        Training rows and held-out rows.

    Raises:
        ValueError: if the fraction is out of range, the seed is negative, or either
            part would be empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"holdout fraction {fraction}: at least 0 and less than 1")
    _check_seed(seed)
    count = round(fraction * len(rows))
    if fraction > 0 and not 0 < count < len(rows):
        raise ValueError(
            f"holdout fraction {fraction}: it holds out {count} of {len(rows)} rows; "
            f"both parts need at least one row"
        )
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    held_out = set(chosen.tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


@functools.lru_cache(maxsize=2)  # training and held-out data alternate
def _order(num_rows: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    # A spawn key makes the streams of all seeds and epochs independent; with seed +
    # epoch one run would see the order of another run, an epoch later.
    key = (epoch, stream) if stream else (epoch,)
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    order = np.random.default_rng(sequence).permutation(num_rows)
    order.setflags(write=False)
    return order


def _check_seed(seed: int | None) -> None:
    if seed is not None and seed < 0:
        raise ValueError(f"seed={seed}: at least 0")


def pad_prompts(rows: Sequence[np.ndarray], *, width: int, pad_id: int) -> Prompts:
    """Prompts of a batch, left-padded to `[B, width]`; NumPy arrays.

    Raises:
        ValueError: for a row longer than `width`.
    """
    tokens, lengths = _pad(rows, width, pad_id, left=True)
    return Prompts(tokens=_host(tokens), lengths=_host(lengths))


def pad_examples(
    rows: Sequence[EncodedExample], *, width: int, pad_id: int
) -> Demonstrations:
    """Examples of a batch, right-padded to `[B, width]`; NumPy arrays.

    The targets are the tokens to train on, including EOS.

    Raises:
        ValueError: for a row longer than `width`.
    """
    tokens, lengths = _pad([row.tokens for row in rows], width, pad_id)
    target_mask = np.zeros(tokens.shape, bool)
    for padded, row in zip(target_mask, rows, strict=True):
        padded[: len(row.learnt)] = row.learnt
    mask = np.arange(width)[None, :] < lengths[:, None]
    return Demonstrations(
        tokens=_host(tokens),
        mask=_host(mask),
        target_mask=_host(target_mask),
    )


def pad_pairs(rows: Sequence[EncodedPair], *, width: int, pad_id: int) -> Preferences:
    """Pairs of a batch, both sides right-padded to `[B, width]`; NumPy arrays.

    Raises:
        ValueError: for a row longer than `width`.
    """
    return Preferences(
        chosen=_sequences([row.chosen for row in rows], width, pad_id),
        rejected=_sequences([row.rejected for row in rows], width, pad_id),
        margin=_host(np.asarray([row.margin for row in rows], np.float32)),
    )


def pad_rankings(
    rows: Sequence[EncodedRanking], *, width: int, num_answers: int, pad_id: int
) -> Rankings:
    """Rankings of a batch, K = `num_answers`, right-padded to `width`; NumPy arrays.

    Raises:
        ValueError: for a response longer than `width` or a ranking of more than
            `num_answers` responses.
    """
    counts = np.asarray([len(row.answers) for row in rows], np.int32)
    if counts.max() > num_answers:
        raise ValueError(
            f"num_answers={num_answers}: a row has {counts.max()} responses"
        )
    shape = (len(rows), num_answers)
    grades = np.zeros(shape, np.float32)
    flat: list[np.ndarray] = []
    for padded, row in zip(grades, rows, strict=True):
        padded[: len(row.grades)] = row.grades
        missing = num_answers - len(row.answers)
        flat += [*row.answers, *[np.zeros(0, np.int32)] * missing]
    answers = _sequences(flat, width, pad_id)
    return Rankings(
        answers=Sequences(
            tokens=answers.tokens.reshape(*shape, width),
            mask=answers.mask.reshape(*shape, width),
        ),
        grades=_host(grades),
        mask=_host(np.arange(num_answers)[None, :] < counts[:, None]),
    )


def _sequences(rows: list[np.ndarray], width: int, pad_id: int) -> Sequences:
    tokens, lengths = _pad(rows, width, pad_id)
    mask = np.arange(width)[None, :] < lengths[:, None]
    return Sequences(tokens=_host(tokens), mask=_host(mask))


def _pad(
    rows: Sequence[np.ndarray], width: int, pad_id: int, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, width]` and lengths `[B]`, both int32."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    if lengths.max() > width:
        raise ValueError(f"width={width}: a row has {lengths.max()} tokens")
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[width - len(row) if left else 0 :][: len(row)] = row
    return tokens, lengths


def _host(array: np.ndarray) -> Array:
    """Casts a NumPy array to the JAX array type that records declare."""
    return cast(Array, array)

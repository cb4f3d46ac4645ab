"""Which rows make up a batch, and the padding that turns rows into one record.

Everything here is NumPy on the host; the caller places a batch on its devices. Every
batch of a data set is padded to one width, so that nothing is compiled twice. Masks
come from lengths: the pad id may be EOS, and may occur within a prompt.
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
    """`batches[step]` for every step from 0 on, the same at every call.

    A run resumes with the number of its next step. Epoch follows epoch without end,
    each in an order of its own, which depends on the seed and the epoch alone. An epoch
    is `steps_per_epoch` whole batches; the last `left_out` rows of its order wait for
    the next epoch.
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
        """Prepares the order; no row is read yet.

        Args:
            rows: the data set; only `len(rows)` and `rows[i]` are asked for.
            collate: makes one batch of `batch_size` rows.
            batch_size: rows per batch.
            seed: of the order, at least 0; None keeps the order of `rows`.
            stream: orders of one seed that have nothing to do with each other.

        Raises:
            ValueError: where the rows do not fill one batch, or the seed is negative.
        """
        if not 1 <= batch_size <= len(rows):
            raise ValueError(
                f"batch_size={batch_size}: the data set has {len(rows)} rows; a batch "
                "has at least one row and at most all of them"
            )
        _check_seed(seed)
        self._rows = rows
        self._collate = collate
        self._batch_size = batch_size
        self._seed = seed
        self._stream = stream
        self.steps_per_epoch, self.left_out = divmod(len(rows), batch_size)

    def indices(self, step: int) -> np.ndarray:
        """`[batch_size]`, where in `rows` the rows of batch number `step` are."""
        step = operator.index(step)
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0")
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self._batch_size
        if self._seed is None:
            return np.arange(begin, begin + self._batch_size)
        order = _order(len(self._rows), self._seed, epoch, self._stream)
        return order[begin : begin + self._batch_size]

    def __getitem__(self, step: int) -> Batch:
        """Batch number `step`."""
        return self._collate([self._rows[int(i)] for i in self.indices(step)])


def holdout(
    rows: Sequence[Row], fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Parts rows into those to train on and those to hold out.

    Which rows are held out depends on seed, fraction and number of rows alone. Both
    parts keep the order of `rows`.

    Args:
        rows: the data set.
        fraction: of the rows to hold out, at least 0 and less than 1; 0 holds out none.
        seed: of the choice, at least 0.

    Returns:
        The rows to train on and the held-out rows.

    Raises:
        ValueError: for a fraction out of range or a negative seed, and where either
            part would come out empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"holdout fraction {fraction}: at least 0 and less than 1")
    _check_seed(seed)
    count = round(fraction * len(rows))
    if fraction > 0 and not 0 < count < len(rows):
        raise ValueError(
            f"holdout fraction {fraction}: of {len(rows)} rows it holds out {count}; "
            "both parts need at least one row"
        )
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    held_out = set(chosen.tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


@functools.lru_cache(maxsize=2)  # as many orders as take turns
def _order(num_rows: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    # A spawn key makes the streams of all seeds and epochs differ; with seed + epoch
    # one run would see the orders of another, an epoch later.
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

    The targets are the tokens to be learnt, EOS included.

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
    """Pairs of a batch, either side right-padded to `[B, width]`; NumPy arrays.

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
        ValueError: for an answer longer than `width` and for a ranking of more than
            `num_answers` answers.
    """
    counts = np.asarray([len(row.answers) for row in rows], np.int32)
    if counts.max() > num_answers:
        raise ValueError(f"num_answers={num_answers}: a row has {counts.max()} answers")
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
    """A NumPy array where a record declares a JAX array, which it stands in for."""
    return cast(Array, array)

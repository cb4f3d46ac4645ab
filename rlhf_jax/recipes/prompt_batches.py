"""Prompts of a run, with the columns for reward functions."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.algo.options import check
from rlhf_jax.algo.types import Prompts
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.data.batches import Batches, pad_prompts
from rlhf_jax.data.encoding import Encoded, Overlong, encode_prompts
from rlhf_jax.data.text_data import Columns, PromptRow, TextRows, read_prompt_rows
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.recipes.splits import read_split
from rlhf_jax.run.progress import heading


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """B prompts: as tokens for the policy, as text for reward functions."""

    prompts: Prompts  # [B, P], NumPy arrays
    rows: list[PromptRow]

    @property
    def texts(self) -> list[str]:
        """The prompts as in the data."""
        return [row.prompt for row in self.rows]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The other columns of the data, with B values each."""
        names = self.rows[0].columns
        return {name: [row.columns[name] for row in self.rows] for name in names}

    def take(self, index: Sequence[int] | np.ndarray) -> "PromptBatch":
        """Some of the prompts, in any order and number."""
        index = np.asarray(index)
        return PromptBatch(
            prompts=jax.tree.map(lambda x: x[index], self.prompts),
            rows=[self.rows[int(i)] for i in index],
        )

    def join(self, other: "PromptBatch") -> "PromptBatch":
        """The prompts of both, concatenated."""
        return PromptBatch(
            prompts=jax.tree.map(
                lambda *x: np.concatenate(x), self.prompts, other.prompts
            ),
            rows=[*self.rows, *other.rows],
        )

    def repeat(self, times: int) -> "PromptBatch":
        """Repeats each prompt this many times, contiguously."""
        return self.take(np.repeat(np.arange(len(self.rows)), times))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData:
    """Training and held-out prompts of one width."""

    rows: list[tuple[PromptRow, np.ndarray]]  # and their tokens
    held_out: PromptBatch
    width: int
    pad_id: int

    def batches(self, *, batch_size: int, seed: int, stream: int = 0) -> Batches:
        """Training batches, by number; each stream of a seed has its own order."""
        return Batches(
            self.rows, self._collate, batch_size=batch_size, seed=seed, stream=stream
        )

    def first(self, number: int) -> PromptBatch:
        """The first training prompts."""
        return self._collate(self.rows[:number])

    def _collate(self, rows: Sequence[tuple[PromptRow, np.ndarray]]) -> PromptBatch:
        return collate(rows, width=self.width, pad_id=self.pad_id)


def collate(
    rows: Sequence[tuple[PromptRow, np.ndarray]], *, width: int, pad_id: int
) -> PromptBatch:
    """Rows and their tokens as a batch."""
    tokens = [tokens for _, tokens in rows]
    return PromptBatch(
        prompts=pad_prompts(tokens, width=width, pad_id=pad_id),
        rows=[row for row, _ in rows],
    )


def encode_rows(
    rows: Sequence[PromptRow],
    *,
    tokenization: Tokenization,
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
) -> tuple[Encoded, list[tuple[PromptRow, np.ndarray]]]:
    """`encode_prompts`, with each remaining row and its tokens, for `collate`."""
    encoded = encode_prompts(
        [row.prompt for row in rows],
        tokenization.encoder,
        max_prompt_tokens=max_prompt_tokens,
        overlong=overlong,
    )
    sources = [rows[source] for source in encoded.sources]
    return encoded, list(zip(sources, encoded.rows, strict=True))


def prompt_reader(
    config: PolicyConfig, tokenization: Tokenization
) -> Callable[[str], TextRows[PromptRow]]:
    """Reads the prompts of a file, and the columns for reward functions."""
    told = bool(config.reward or config.eval_reward)
    return partial(
        read_prompt_rows,
        columns=Columns(prompt=config.prompt_column),
        keep=(config.reward_columns or None) if told else (),
        render_chat=tokenization.render,
        on_unusable=config.unusable_prompts,
    )


def read_prompt_data(config: PolicyConfig, tokenization: Tokenization) -> PromptData:
    """Reads and encodes the prompts of a run; prints their number.

    Raises:
        ValueError: one line with the file, the line and the problem.
    """
    read = prompt_reader(config, tokenization)
    train, held_out = read_split(config, read, prompt_of=lambda row: row.prompt)
    held_out = held_out[: config.eval_prompts]

    encode = partial(
        encode_rows,
        tokenization=tokenization,
        max_prompt_tokens=config.max_prompt_tokens,
        overlong=config.overlong,
    )
    encoded, train_rows = encode(train)
    encoded_held_out, held_out_rows = encode(held_out)
    width = max(encoded.width, encoded_held_out.width)
    heading(
        f"{config.stage}: {len(train_rows)} training and {len(held_out_rows)} held-out "
        f"prompts of at most {width} tokens; too long: {encoded.dropped} dropped, "
        f"{encoded.truncated} truncated",
        quiet=config.quiet,
    )
    return PromptData(
        rows=train_rows,
        held_out=collate(held_out_rows, width=width, pad_id=tokenization.pad_id),
        width=width,
        pad_id=tokenization.pad_id,
    )


def prompt_order(
    config: GRPOConfig, data: PromptData
) -> Callable[[int, int], PromptBatch]:
    """`(step, round) -> PromptBatch`: the order of prompts.

    Later rounds have a separate order, so the first rounds skip no prompt, and resuming
    does not depend on how often prompts were resampled.

    Raises:
        ValueError: there are fewer prompts than in a batch.
    """
    number = config.batch_size // config.group_size
    check(
        number <= len(data.rows),
        "batch-size",
        config.batch_size,
        f"requires {number} prompts with group-size={config.group_size}; there are "
        f"{len(data.rows)} training prompts",
    )
    first = data.batches(batch_size=number, seed=config.seed)
    further = data.batches(batch_size=number, seed=config.seed, stream=1)

    def prompts_of(step: int, round_number: int) -> PromptBatch:
        if round_number == 0:
            return first[step - 1]
        return further[(step - 1) * config.resample + round_number - 1]

    return prompts_of

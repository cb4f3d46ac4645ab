"""What a stage makes of a data set, shown before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_jax.recipes import feedback, prompt_batches, sft_data
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.show_data_config import ShowDataConfig
from rlhf_jax.recipes.texts import read_reported
from rlhf_jax.recipes.token_view import TokenRow, page, show
from rlhf_jax.runtime.encoding import Encoded
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.run_directory import write_atomic

_NOTES = {
    "sft": "",
    "reward": "the score is read at the last token",
    "prompts": "the policy answers from here on",
}
_LEARNT = {"sft": "learnt", "reward": "judged", "prompts": "learnt"}
_NAMES = {"sft": "sequences", "reward": "pairs", "prompts": "prompts"}


def run(config: ShowDataConfig) -> list[str]:
    """Prints examples and counts; returns the lines of the counts.

    Raises:
        ValueError: one line, on bad input.
    """
    config.validate()
    if config.html is not None:
        Path(config.html).parent.mkdir(parents=True, exist_ok=True)
    language, encoded, rows_of = _READERS[config.task](config)
    shown = encoded.rows[: config.limit]
    rows = []
    for number, item in enumerate(shown, start=1):
        rows += rows_of(item, f"{number} of {len(encoded.rows)}")
    learnt = _LEARNT[config.task]
    summary = _summary(config, encoded, rows_of)
    show(Console(), rows, language, learnt=learnt)
    print()
    for line in summary:
        heading(line)
    if config.html is not None:
        text = page(rows, language, summary, learnt=learnt)
        write_atomic(Path(config.html), text)
        heading(f"written to {config.html}")
    return summary


RowsOf = Callable[[Any, str], list[TokenRow]]
Read = tuple[Language, Encoded[Any], RowsOf]


def _read_sft(config: ShowDataConfig) -> Read:
    stage = config.sft_config()
    language = sft_data.load_language(stage)
    assert language is not None  # the configuration names a model
    examples = sft_data.read_data(stage, stage.data, language)

    def rows_of(row: Any, title: str) -> list[TokenRow]:
        learnt = row.learnt.copy()
        learnt[0] = False  # nothing comes before it
        return [TokenRow(title=title, tokens=row.tokens, learnt=learnt)]

    return language, sft_data.encode_data(stage, language, examples), rows_of


def _read_reward(config: ShowDataConfig) -> Read:
    stage = config.reward_config()
    language = Language.load(stage.model)
    read = feedback.pair_reader(stage, language)
    pairs = read_reported(stage.data, read, quiet=False)

    def rows_of(row: Any, title: str) -> list[TokenRow]:
        sides = {"chosen": row.chosen, "rejected": row.rejected}
        return [
            TokenRow(
                title=f"{title}, {name}",
                tokens=tokens,
                learnt=np.arange(len(tokens)) >= row.prompt_length,
                note=_NOTES["reward"],
            )
            for name, tokens in sides.items()
        ]

    return language, feedback.encode_feedback(stage, language, pairs), rows_of


def _read_prompts(config: ShowDataConfig) -> Read:
    stage = config.policy_config()
    language = Language.load(stage.policy)
    read = prompt_batches.prompt_reader(stage, language)
    prompts = read_reported(stage.data, read, quiet=False)
    encoded, _ = prompt_batches.encode_rows(
        prompts,
        language=language,
        max_prompt_tokens=stage.max_prompt_tokens,
        overlong=stage.overlong,
    )

    def rows_of(row: Any, title: str) -> list[TokenRow]:
        nothing = np.zeros(len(row), bool)
        note = _NOTES["prompts"]
        return [TokenRow(title=title, tokens=row, learnt=nothing, note=note)]

    return language, encoded, rows_of


_READERS: dict[str, Callable[[ShowDataConfig], Read]] = {
    "sft": _read_sft,
    "reward": _read_reward,
    "prompts": _read_prompts,
}


def _summary(
    config: ShowDataConfig, encoded: Encoded[Any], rows_of: RowsOf
) -> list[str]:
    sequences = [row for item in encoded.rows for row in rows_of(item, "")]
    tokens = sum(len(row.tokens) for row in sequences)
    learnt = sum(int(row.learnt.sum()) for row in sequences)
    longest = max(len(row.tokens) for row in sequences)
    share = f", {learnt} {_LEARNT[config.task]} ({learnt / tokens:.1%})"
    return [
        f"{len(encoded.rows)} {_NAMES[config.task]} of at most {longest} tokens; "
        f"{sft_data.too_long(encoded)}",
        f"{tokens} tokens" + (share if config.task != "prompts" else ""),
    ]

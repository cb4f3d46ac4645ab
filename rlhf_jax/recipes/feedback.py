"""Human feedback of every form, as the batches and held-out pairs of a reward model."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_jax.algo.types import Preferences
from rlhf_jax.recipes.configs import RewardConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.texts import hold_out_groups, read_reported, read_split
from rlhf_jax.runtime.annotation import read_annotation_file
from rlhf_jax.runtime.batches import Batches, pad_pairs, pad_rankings
from rlhf_jax.runtime.comparisons import Comparisons, RankedAnswers, compare
from rlhf_jax.runtime.encoding import (
    Encoded,
    EncodedPair,
    encode_pairs,
    encode_rankings,
)
from rlhf_jax.runtime.judgements import read_judgements
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.row_forms import PreferencePair
from rlhf_jax.runtime.text_data import TextRows, read_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """What a reward model is trained and measured on."""

    batches: Batches  # of `Preferences`; under losses of whole rankings, of `Rankings`
    held_out: Preferences
    width: int  # of every sequence
    num_answers: int  # in a row of a batch: 2 of a pair, K of a ranking


def read_feedback(config: RewardConfig, language: Language) -> Feedback:
    """Reads, splits by prompt and encodes; prints what was found and left out.

    Raises:
        ValueError: one line, on bad input.
    """
    pairs, rankings, held_out_pairs = _read(config, language)
    held_out = encode_feedback(config, language, held_out_pairs)
    encoded: Encoded[Any]
    pad_rows: Callable[..., Any]
    if config.loss == "bradley-terry":
        encoded, pad_rows = encode_feedback(config, language, pairs), pad_pairs
        num_answers = 2
    else:
        encoded = encode_rankings(
            _usable(rankings, config),
            language.encoder,
            max_tokens=config.max_tokens,
            overlong=config.overlong,
        )
        num_answers = max(len(row.answers) for row in encoded.rows)
        pad_rows = partial(pad_rankings, num_answers=num_answers)
    width = max(encoded.width, held_out.width)
    what = "pairs" if config.loss == "bradley-terry" else "rankings"
    heading(
        f"reward: {len(encoded.rows)} training {what} and {len(held_out.rows)} "
        f"held-out pairs of at most {width} tokens; too long: {encoded.dropped} "
        f"dropped, {encoded.truncated} truncated",
        quiet=config.quiet,
    )
    collate = partial(pad_rows, width=width, pad_id=language.pad_id)
    return Feedback(
        batches=Batches(
            encoded.rows, collate, batch_size=config.batch_size, seed=config.seed
        ),
        held_out=pad_pairs(held_out.rows, width=width, pad_id=language.pad_id),
        width=width,
        num_answers=num_answers,
    )


def pair_reader(
    config: RewardConfig, language: Language
) -> Callable[[str], TextRows[PreferencePair]]:
    """Reads the preference pairs of a file."""
    return partial(
        read_pairs, render_chat=language.render, on_unusable=config.unusable_pairs
    )


def encode_feedback(
    config: RewardConfig, language: Language, pairs: list[PreferencePair]
) -> Encoded[EncodedPair]:
    """The tokens of preference pairs."""
    return encode_pairs(
        pairs,
        language.encoder,
        max_tokens=config.max_tokens,
        overlong=config.overlong,
    )


def _read(
    config: RewardConfig, language: Language
) -> tuple[list[PreferencePair], list[RankedAnswers], list[PreferencePair]]:
    """Training pairs, the rankings they come from, if any, and held-out pairs."""
    if config.feedback == "pairs":
        read = pair_reader(config, language)
        pairs, held_out = read_split(config, read, prompt_of=lambda pair: pair.prompt)
        return pairs, [], held_out
    found = _compared(config.data, config, language)
    if config.eval_data is not None:
        held_out = _compared(config.eval_data, config, language).pairs
        return found.pairs, found.rankings, held_out
    prompts = [pair.prompt for pair in found.pairs]
    pairs, held_out = hold_out_groups(
        found.pairs, prompts, config.eval_fraction, config.seed
    )
    known = {pair.prompt for pair in pairs}
    return pairs, [r for r in found.rankings if r.prompt in known], held_out


def _compared(path: str, config: RewardConfig, language: Language) -> Comparisons:
    """Pairs and rankings of a file; prints what is wrong with its judgements."""
    if config.feedback == "judgements":
        read = partial(
            read_judgements,
            scale=config.scale,
            render_chat=language.render,
            on_unusable=config.unusable_pairs,
        )
    else:
        read = partial(read_annotation_file, on_unfilled=config.on_unfilled)
    found = compare(
        read_reported(path, read, quiet=config.quiet),
        margin_step=config.margin_step,
        on_contradiction=config.on_contradiction,
    )
    for line in found.report():
        heading(f"{path}: {line}", quiet=config.quiet)
    left = found.pairs if config.loss == "bradley-terry" else found.rankings
    if not left:
        raise ValueError(
            f"{path}: no judgement is left that prefers one answer to another"
        )
    return found


def _usable(rankings: list[RankedAnswers], config: RewardConfig) -> list[RankedAnswers]:
    """Those that the loss can learn from; says how many are left out."""
    if config.loss != "plackett-luce":
        return rankings
    strict = [ranking for ranking in rankings if not ranking.has_ties]
    if not strict:
        raise ValueError(
            f"loss={config.loss}: each of the {len(rankings)} training rankings has "
            "ties, which it does not know; take loss=pairwise-ranking"
        )
    if len(strict) < len(rankings):
        heading(
            f"{config.data}: {len(rankings) - len(strict)} of {len(rankings)} training "
            f"rankings left out: they have ties, which {config.loss} does not know and "
            "pairwise-ranking does",
            quiet=config.quiet,
        )
    return strict

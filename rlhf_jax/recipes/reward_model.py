"""Stage 2: a reward model learns from judgements which answers people like better."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.preferences import (
    pairwise_ranking_loss,
    plackett_luce_loss,
    preference_loss,
)
from rlhf_jax.algo.types import Array, Params, Preferences, Rankings
from rlhf_jax.config.supervised import RewardConfig
from rlhf_jax.data.annotation import read_annotation_file
from rlhf_jax.data.batches import Batches, pad_pairs, pad_rankings
from rlhf_jax.data.comparisons import Comparisons, RankedAnswers, compare
from rlhf_jax.data.encoding import Encoded, EncodedPair, encode_pairs, encode_rankings
from rlhf_jax.data.judgements import read_judgements
from rlhf_jax.data.row_forms import PreferencePair
from rlhf_jax.data.text_data import TextRows, read_pairs
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.learner.gradients import Objective
from rlhf_jax.learner.preference import (
    count_pairs,
    count_rankings,
    preference_objective,
    ranking_objective,
)
from rlhf_jax.models.callables import reward_model
from rlhf_jax.recipes.networks import Networks, check_fits
from rlhf_jax.recipes.splits import hold_out_groups, read_reported, read_split
from rlhf_jax.recipes.supervised_loop import SupervisedStage, train
from rlhf_jax.run.devices import make_mesh, map_batches
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """What a reward model is trained and measured on."""

    batches: Batches  # of `Preferences`; under losses of whole rankings, of `Rankings`
    held_out: Preferences
    width: int  # of every sequence
    num_answers: int  # in a row of a batch: 2 of a pair, K of a ranking


def read_feedback(config: RewardConfig, tokenization: Tokenization) -> Feedback:
    """Reads, splits by prompt and encodes; prints what was found and left out.

    Raises:
        ValueError: one line, on bad input.
    """
    pairs, rankings, held_out_pairs = _read(config, tokenization)
    held_out = encode_feedback(config, tokenization, held_out_pairs)
    encoded: Encoded[Any]
    pad_rows: Callable[..., Any]
    if config.loss == "bradley-terry":
        encoded, pad_rows = encode_feedback(config, tokenization, pairs), pad_pairs
        num_answers = 2
    else:
        encoded = encode_rankings(
            _usable(rankings, config),
            tokenization.encoder,
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
    collate = partial(pad_rows, width=width, pad_id=tokenization.pad_id)
    return Feedback(
        batches=Batches(
            encoded.rows, collate, batch_size=config.batch_size, seed=config.seed
        ),
        held_out=pad_pairs(held_out.rows, width=width, pad_id=tokenization.pad_id),
        width=width,
        num_answers=num_answers,
    )


def pair_reader(
    config: RewardConfig, tokenization: Tokenization
) -> Callable[[str], TextRows[PreferencePair]]:
    """Reads the preference pairs of a file."""
    return partial(
        read_pairs, render_chat=tokenization.render, on_unusable=config.unusable_pairs
    )


def encode_feedback(
    config: RewardConfig, tokenization: Tokenization, pairs: list[PreferencePair]
) -> Encoded[EncodedPair]:
    """The tokens of preference pairs."""
    return encode_pairs(
        pairs,
        tokenization.encoder,
        max_tokens=config.max_tokens,
        overlong=config.overlong,
    )


def _read(
    config: RewardConfig, tokenization: Tokenization
) -> tuple[list[PreferencePair], list[RankedAnswers], list[PreferencePair]]:
    """Training pairs, the rankings they come from, if any, and held-out pairs."""
    if config.feedback == "pairs":
        read = pair_reader(config, tokenization)
        pairs, held_out = read_split(config, read, prompt_of=lambda pair: pair.prompt)
        return pairs, [], held_out
    found = _compared(config.data, config, tokenization)
    if config.eval_data is not None:
        held_out = _compared(config.eval_data, config, tokenization).pairs
        return found.pairs, found.rankings, held_out
    prompts = [pair.prompt for pair in found.pairs]
    pairs, held_out = hold_out_groups(
        found.pairs, prompts, config.eval_fraction, config.seed
    )
    known = {pair.prompt for pair in pairs}
    return pairs, [r for r in found.rankings if r.prompt in known], held_out


def _compared(
    path: str, config: RewardConfig, tokenization: Tokenization
) -> Comparisons:
    """Pairs and rankings of a file; prints what is wrong with its judgements."""
    if config.feedback == "judgements":
        read = partial(
            read_judgements,
            scale=config.scale,
            render_chat=tokenization.render,
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


def run(config: RewardConfig) -> RunDirectory:
    """Trains, and writes the model as a Hugging Face sequence classifier.

    Raises:
        ValueError: on bad input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="reward")
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    # ---- text ----
    tokenization = Tokenization.load(config.model)
    feedback = read_feedback(config, tokenization)

    # ---- model ----
    head_key, run_key = jax.random.split(jax.random.key(config.seed))
    network, params = Networks(config, mesh).trained(
        config.model, "reward", key=head_key
    )
    module = network.module
    width = feedback.width
    check_fits(module, tokenization, needed=width, name="the model", why="max-tokens")
    score_fn = reward_model(module)

    # ---- train ----
    objective, count = _objective(config, score_fn)
    stage = SupervisedStage(
        name="reward",
        objective=objective,
        count=count,
        evaluate=make_evaluation(
            score_fn, feedback.held_out, batch_size=config.batch_size, mesh=mesh
        ),
        batches=feedback.batches,
        tokens_per_step=feedback.num_answers * config.batch_size * width,
        shown={
            "loss": "train/loss",
            "accuracy": "train/accuracy",
            "held-out accuracy": "eval/accuracy",
        },
    )
    return train(
        config,
        stage,
        network,
        params,
        key=run_key,
        tokenization=tokenization,
        mesh=mesh,
    )


def make_evaluation(
    score_fn: ScoreFn, pairs: Preferences, *, batch_size: int, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Loss and accuracy on held-out pairs, by parameters.

    The loss is that of Bradley and Terry without margins or label smoothing, whatever
    is trained: so runs on other forms of feedback and other losses compare.
    """
    scores_of = jax.jit(
        lambda params, pairs: (
            score_fn(params, pairs.chosen.tokens, pairs.chosen.mask),
            score_fn(params, pairs.rejected.tokens, pairs.rejected.mask),
        )
    )

    def evaluate(params: Params) -> dict[str, float]:
        chosen, rejected = map_batches(
            lambda _, batch: scores_of(params, batch),
            pairs,
            batch_size=batch_size,
            mesh=mesh,
        )
        return {
            "eval/loss": float(np.mean(preference_loss(chosen, rejected))),
            "eval/accuracy": float(np.mean(chosen > rejected)),
            "eval/score_mean": float(np.mean(np.concatenate([chosen, rejected]))),
            "eval/score_std": float(np.std(np.concatenate([chosen, rejected]))),
        }

    return evaluate


def _objective(
    config: RewardConfig, score_fn: ScoreFn
) -> tuple[Objective, Callable[[Any], Array]]:
    """What is minimised, and its divisor."""
    if config.loss == "bradley-terry":
        objective = preference_objective(
            score_fn,
            label_smoothing=config.label_smoothing,
            center_coef=config.center_coef,
        )
        return objective, count_pairs

    def loss_fn(scores: Array, batch: Rankings) -> Array:
        if config.loss == "plackett-luce":
            return plackett_luce_loss(scores, mask=batch.mask)
        return pairwise_ranking_loss(
            scores,
            batch.grades,
            mask=batch.mask,
            margin_step=config.margin_step,
            label_smoothing=config.label_smoothing,
        )

    objective = ranking_objective(score_fn, loss_fn, center_coef=config.center_coef)
    return objective, count_rankings

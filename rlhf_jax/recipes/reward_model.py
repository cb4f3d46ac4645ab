"""Stage 2: train a reward model on human judgments of responses.

Start with `train`, the training loop.
"""

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
from rlhf_jax.data.comparisons import Comparisons, RankedResponses, compare
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
from rlhf_jax.learner.train_state import ModelState
from rlhf_jax.models.callables import reward_model
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.recipes.networks import Networks, check_adapters, check_fits
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.recipes.splits import hold_out_groups, read_reported, read_split
from rlhf_jax.recipes.supervised_run import (
    SupervisedRun,
    SupervisedSetup,
    supervised_setup,
)
from rlhf_jax.run.devices import make_mesh, map_batches, put_batch
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start
from rlhf_jax.run.stopwatch import Stopwatch

SHOWN = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "held-out accuracy": "eval/accuracy",
}


def run(config: RewardConfig) -> RunDirectory:
    """Trains and saves the model as a Hugging Face sequence classifier.

    Raises:
        ValueError: for invalid input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: if a loss or gradient is not finite.
    """
    # Validate all input before reading weights.
    check_start(config)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    tokenization = Tokenization.load(config.model)
    feedback = read_feedback(config, tokenization)
    shape = open_checkpoint(config.model).config
    check_adapters(config, shape)
    check_fits(
        shape,
        tokenization,
        needed=feedback.width,
        name="the model",
        why="max-tokens",
    )

    reward = setup(config, Networks(config, mesh))
    with SupervisedRun(
        config,
        reward,
        evaluate=make_evaluation(
            reward_model(reward.network.module),
            feedback.held_out,
            batch_size=config.batch_size,
            mesh=mesh,
        ),
        tokenization=tokenization,
        tokens_per_step=feedback.num_answers * config.batch_size * feedback.width,
        shown=SHOWN,
    ) as reward_run:
        state = train(reward, reward_run, feedback.batches, mesh)
        reward_run.save(state)
    reward_run.report()
    return reward_run.directory


def train(
    reward: SupervisedSetup, run: SupervisedRun, batches: Batches, mesh: Mesh
) -> ModelState:
    """The training loop."""
    state = run.restore(reward.state)
    run.evaluate_start(state)

    for step in run.steps():
        clock = Stopwatch()

        # Pairs of a chosen and a rejected response, or rankings. The loss is the
        # negative log-likelihood of the judgments, given the scores.
        batch = put_batch(mesh, batches[step - 1])

        # One compiled program, to which the old state is donated.
        state, metrics = reward.update(state, batch, reward.network.frozen)

        state = run.finish(step, state, metrics, batch, clock)
    return state


def setup(config: RewardConfig, networks: Networks) -> SupervisedSetup:
    """Network, optimizer, state and compiled step of a run.

    Args:
        config: validated configuration.
        networks: builds the network, or its shapes.
    """
    head_key, run_key = jax.random.split(seed_key(config.seed))
    network, params = networks.trained(config.model, "reward", key=head_key)
    objective, count = _objective(config, reward_model(network.module))
    return supervised_setup(
        config,
        networks,
        network,
        params,
        key=run_key,
        objective=objective,
        count=count,
    )


def _objective(
    config: RewardConfig, score_fn: ScoreFn
) -> tuple[Objective, Callable[[Any], Array]]:
    """The objective to minimize, and its divisor."""
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


def make_evaluation(
    score_fn: ScoreFn, pairs: Preferences, *, batch_size: int, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Loss and accuracy on held-out pairs, by parameters.

    The loss is Bradley–Terry without margins or label smoothing, whatever the training
    loss, so runs with different feedback and losses can be compared.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """Training and held-out data of a reward model."""

    batches: Batches  # of `Preferences`, or of `Rankings` with ranking losses
    held_out: Preferences
    width: int  # of every sequence
    num_answers: int  # per row of a batch: 2 for a pair, K for a ranking


def read_feedback(config: RewardConfig, tokenization: Tokenization) -> Feedback:
    """Reads, splits by prompt and encodes; prints how many rows are used and dropped.

    Raises:
        ValueError: one line, for invalid input.
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
) -> tuple[list[PreferencePair], list[RankedResponses], list[PreferencePair]]:
    """Training pairs, their rankings, if any, and held-out pairs."""
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
    """Pairs and rankings of a file; prints problems with its judgments."""
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
            f"{path}: no remaining judgment prefers one response to another"
        )
    return found


def _usable(
    rankings: list[RankedResponses], config: RewardConfig
) -> list[RankedResponses]:
    """Rankings that the loss supports; prints how many are dropped."""
    if config.loss != "plackett-luce":
        return rankings
    strict = [ranking for ranking in rankings if not ranking.has_ties]
    if not strict:
        raise ValueError(
            f"loss={config.loss}: each of the {len(rankings)} training rankings has "
            "ties, which it does not support; use loss=pairwise-ranking"
        )
    if len(strict) < len(rankings):
        heading(
            f"{config.data}: {len(rankings) - len(strict)} of {len(rankings)} training "
            f"rankings dropped: they have ties, which {config.loss} does not support "
            "and pairwise-ranking does",
            quiet=config.quiet,
        )
    return strict

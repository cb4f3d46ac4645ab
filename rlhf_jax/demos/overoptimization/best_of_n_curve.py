"""Best of n by a reward model, for every n from one set of samples."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.best_of_n import best_of_n_kl, best_of_n_mean
from rlhf_jax.algo.scores import EnsembleScore, combine_scores
from rlhf_jax.algo.types import Array
from rlhf_jax.config.demos import OveroptimizationConfig
from rlhf_jax.demos.overoptimization.curves import Curve
from rlhf_jax.demos.review_panel import ReviewPanel
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.rewards.reward_models import RewardJudge
from rlhf_jax.run.progress import progress
from rlhf_jax.tasks import reviews

ROUND = 16  # samples per prompt between progress lines


def sample_and_score(
    config: OveroptimizationConfig,
    sft_model: Path,
    reward_models: Sequence[Path],
    prompts: Sequence[str],
    store: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples the SFT model and returns K reward model scores and true rewards.

    Args:
        config: of the command.
        sft_model: Hugging Face directory of the policy.
        reward_models: K directories.
        prompts: P texts.
        store: file for the numbers; loaded if it exists.

    Returns:
        Scores `[K, P, N]` and true rewards `[P, N]`, float32.
    """
    if store.exists():
        with np.load(store) as found:
            return found["scores"], found["true"]
    panel, judge = ReviewPanel(sft_model), RewardJudge(reward_models, batch_size=256)
    scores, true = [], []
    total = config.best_of_samples
    with progress(total, "best of n", quiet=config.quiet) as shown:
        for start in range(0, total, ROUND):
            count = min(ROUND, total - start)
            asked = [text for text in prompts for _ in range(count)]
            texts, _ = panel.answers(asked, seed=config.seed + start)
            shape = (len(prompts), count)
            scores.append(judge.scores(asked, texts).reshape(-1, *shape))
            true.append(reviews.true_rewards(asked, texts).reshape(shape))
            shown.update(start + count, {"true": float(np.mean(true[-1]))})
    by_model = np.concatenate(scores, axis=2).astype(np.float32)
    truth = np.concatenate(true, axis=1).astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, scores=by_model, true=truth)
    write_atomic(store, buffer.getvalue())
    return by_model, truth


def best_of_n_curves(
    scores: np.ndarray,
    true: np.ndarray,
    *,
    ensembles: Sequence[EnsembleScore],
    penalty: float,
) -> list[Curve]:
    """One curve for the first reward model, and one per ensemble type.

    Args:
        scores: `[K, P, N]` float32, of K reward models: N responses to P prompts.
        true: `[P, N]` float32.
        ensembles: how the models are combined.
        penalty: λ of mean-minus-std.
    """
    models, prompts, samples = scores.shape
    flat = jnp.asarray(scores.reshape(models, -1))
    by: dict[EnsembleScore | Literal["single"], Array] = {"single": flat[0]}
    for how in ensembles:
        by[how] = combine_scores(flat, how=how, penalty=penalty)
    # Up to N / 2: at n = N there is only one subset, so the estimate is one sample.
    counts = [2**power for power in range(int(math.log2(samples)))]
    curves = []
    for scored_by, combined in by.items():
        proxy = combined.reshape(prompts, samples)
        measured = [
            [
                np.asarray(best_of_n_mean(proxy, jnp.asarray(values), n=n))  # [P]
                for values in (proxy, true)
            ]
            for n in counts
        ]
        curves.append(
            Curve(
                name=f"best of n, {scored_by}",
                method="best-of-n",
                scored_by=scored_by,
                beta=None,
                at=counts,
                kl=[best_of_n_kl(n) for n in counts],
                proxy=[float(np.mean(of_proxy)) for of_proxy, _ in measured],
                true=[float(np.mean(of_true)) for _, of_true in measured],
                true_error=[
                    float(np.std(of_true, ddof=1) / math.sqrt(prompts))
                    for _, of_true in measured
                ],
            )
        )
    return curves

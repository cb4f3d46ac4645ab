"""The configuration of `rlhf-jax overoptimization`: flags, keys of the file, help.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.ensembles import EnsembleScore
from rlhf_jax.algo.options import check
from rlhf_jax.runtime.config import check_positive

REWARD_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class OveroptimizationConfig:
    """Reward hacking on short reviews, seen and controlled: a figure and its numbers.

    PPO with several KL coefficients and best-of-n are pushed against a reward model
    that learned from few pairs; the true reward, which no training sees, says where
    pleasing it stops paying. Ensembles of reward models and early stopping are shown
    against that.
    """

    run_dir: str = "runs/overoptimization"
    """directory for all runs, the figure, the numbers and the report; the same command
    goes on with what is there. Only betas, ensembles, ensemble-beta and patience may
    differ then"""
    quickstart: str | None = None
    """run directory of a quickstart, whose SFT model, pairs and prompts are used;
    without it these are made first, in quickstart/ of the run directory"""
    pairs: int = 1_000
    """preference pairs that a reward model learns from; the fewer, the easier it is
    to exploit"""
    models: int = 4
    """reward models; the first is the single model, all of them are the ensembles"""
    ensemble_pairs: Literal["own", "same"] = "own"
    """whether each reward model learns from pairs of its own, or all from the same
    and differ in their seed alone: such models err more alike"""
    reward_steps: int = 50
    """optimizer steps of 64 pairs for each reward model"""
    betas: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3)
    """KL coefficients of PPO against the single model"""
    ensembles: tuple[EnsembleScore, ...] = ("worst", "mean-minus-std")
    """how ensembles of all reward models make one score: PPO and best-of-n for each"""
    ensemble_beta: float = 0.0
    """KL coefficient of PPO against ensembles; must be among the betas to compare"""
    ensemble_penalty: float = 1.0
    """λ of mean − λ · standard deviation over the reward models"""
    updates: int = 60
    """PPO updates of each run"""
    batch_size: int = 64
    """answers per update"""
    eval_every: int = 3
    """updates between evaluations, which are the points of a curve"""
    eval_prompts: int = 256
    """held-out prompts answered at each evaluation"""
    best_of_prompts: int = 64
    """held-out prompts for best-of-n"""
    best_of_samples: int = 512
    """answers to each of them, N; best of n is estimated for n = 1, 2, 4 … N / 2"""
    patience: int = 3
    """evaluations without a new best after which early stopping ends a run"""
    seed: int = 0
    """all randomness follows from it"""
    quiet: bool = False
    """print only the table"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            self.pairs >= REWARD_BATCH_SIZE,
            "pairs",
            self.pairs,
            f"must be at least {REWARD_BATCH_SIZE}, a batch of the reward model",
        )
        check_positive(
            reward_steps=self.reward_steps,
            updates=self.updates,
            batch_size=self.batch_size,
            eval_every=self.eval_every,
            eval_prompts=self.eval_prompts,
            patience=self.patience,
        )
        check(
            self.models >= 2,
            "models",
            self.models,
            "an ensemble needs 2 or more",
        )
        check(
            self.best_of_prompts >= 2,
            "best-of-prompts",
            self.best_of_prompts,
            "must be at least 2, for a standard error over prompts",
        )
        check(
            self.best_of_samples >= 4,
            "best-of-samples",
            self.best_of_samples,
            "must be at least 4, for curves of n = 1, 2",
        )
        check(
            len(set(self.betas)) == len(self.betas)
            and min(self.betas, default=-1) >= 0,
            "betas",
            self.betas,
            "give one or more different numbers, none negative",
        )
        check(
            len(set(self.ensembles)) == len(self.ensembles),
            "ensembles",
            self.ensembles,
            "give each kind once",
        )
        check(
            self.ensemble_beta in self.betas,
            "ensemble-beta",
            self.ensemble_beta,
            f"must be one of betas={self.betas}: the single model's run to compare",
        )
        check(
            self.ensemble_penalty >= 0,
            "ensemble-penalty",
            self.ensemble_penalty,
            "must not be negative",
        )

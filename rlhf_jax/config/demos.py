"""The configuration of `rlhf-jax arithmetic`.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.algo.scores import EnsembleScore
from rlhf_jax.config.run import check_positive
from rlhf_jax.tasks.arithmetic_problems import MOST_DIGITS, OPERATIONS

Form = Literal["plain", "reasoning", "r1-zero"]
Method = Literal[
    "ppo",
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "dapo",
    "gspo",
    "cispo",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """Verifiable rewards on arithmetic, from nothing, in minutes on a laptop.

    A small model imitates a careless pupil, who gets about half of the problems right.
    Then reinforcement learning rewards right answers, and a table says what that
    changed. The same command goes on with what is in the run directory.
    """

    run_dir: str = "runs/arithmetic"
    """directory for the data, both runs, the table and the summary"""
    form: Form = "reasoning"
    """reasoning: demonstrations show <think> steps before the <answer>; plain: the
    answer only; r1-zero: a base model that read plain text and never that form, which
    is then rewarded beside the right answer"""
    method: Method = "grpo"
    """ppo, with a critic, or a preset of `rlhf-jax grpo`"""
    digits: int = 2
    """of each number, 1 to 3"""
    operations: str = "+-"
    """one or several of + - *"""
    slips: float = 0.35
    """share of columns that the pupil gets wrong"""
    demonstrations: int = 7_000
    """how many are imitated, or all there are"""
    sft_steps: int | None = None
    """optimizer steps of imitation; without it, as many as the form needs"""
    updates: int | None = None
    """of reinforcement learning; without it, as many as the form needs"""
    batch_size: int = 256
    """answers per update"""
    learning_rate: float | None = None
    """of the policy in reinforcement learning, at its peak; without it, the form's"""
    eval_problems: int = 256
    """held-out problems, each answered four times"""
    seed: int = 0
    """all randomness follows from it"""
    quiet: bool = False
    """print only the final table"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(bool(self.run_dir), "run-dir", self.run_dir, "name a directory")
        check(
            1 <= self.digits <= MOST_DIGITS,
            "digits",
            self.digits,
            f"must be 1 to {MOST_DIGITS}",
        )
        check(
            bool(self.operations) and set(self.operations) <= set(OPERATIONS),
            "operations",
            self.operations,
            f"give one or several of {OPERATIONS}",
        )
        check(self.seed >= 0, "seed", self.seed, "must not be negative")
        check(0 <= self.slips < 1, "slips", self.slips, "must lie in [0, 1)")
        check_positive(
            demonstrations=self.demonstrations,
            batch_size=self.batch_size,
            eval_problems=self.eval_problems,
        )
        for flag, value in (("sft-steps", self.sft_steps), ("updates", self.updates)):
            check(value is None or value >= 1, flag, value, "must be at least 1")
        check(
            self.learning_rate is None or self.learning_rate > 0,
            "learning-rate",
            self.learning_rate,
            "must be above 0",
        )


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """All three stages on short reviews, from nothing, in minutes on a laptop."""

    run_dir: str = "runs/quickstart"
    """directory for the three runs, the table and the summary"""
    seed: int = 0
    """all randomness follows from it"""
    quiet: bool = False
    """print only the final table"""

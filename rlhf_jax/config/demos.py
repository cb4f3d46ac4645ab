"""The options of `quickstart`, `arithmetic` and `overoptimization`.

The string below each field is its command-line help.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.algo.scores import EnsembleScore
from rlhf_jax.config.limits import check_numbers
from rlhf_jax.config.run import check_positive
from rlhf_jax.tasks.arithmetic_problems import MOST_DIGITS, OPERATIONS

MOST_DEMO_SEED = 2**57 - 1
"""The runs of a demo have seeds of about 100 times its own, in 64 bits."""

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
    """Verifiable rewards on arithmetic, from scratch, in minutes on a laptop.

    A small model is trained on error-prone demonstrations, about half of them correct.
    Reinforcement learning then rewards correct answers, and a table compares before and
    after. Running the same command again resumes from the run directory.
    """

    run_dir: str = "runs/arithmetic"
    """directory for the data, both runs, the table and the summary"""
    form: Form = "reasoning"
    """reasoning: demonstrations show <think> steps before the <answer>; plain: the
    answer only; r1-zero: a base model trained on plain text without these tags, which
    are then rewarded in addition to the correct answer"""
    method: Method = "grpo"
    """ppo, with a critic, or a preset of `rlhf-jax grpo`"""
    digits: int = 2
    """digits per number, 1 to 3"""
    operations: str = "+-"
    """one or more of + - *"""
    slips: float = 0.35
    """error rate per column in the demonstrations"""
    demonstrations: int = 7_000
    """number of SFT demonstrations, or all if there are fewer"""
    sft_steps: int | None = None
    """optimizer steps of SFT; None: depends on form"""
    updates: int | None = None
    """updates of reinforcement learning; None: depends on form"""
    batch_size: int = 256
    """responses per update"""
    learning_rate: float | None = None
    """peak learning rate of the policy in reinforcement learning; None: depends on
    form"""
    eval_problems: int = 256
    """held-out problems, with four responses each"""
    seed: int = 0
    """seed of all randomness, from 0 to 2^57 − 1"""
    quiet: bool = False
    """print only the final table"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self, most_seed=MOST_DEMO_SEED)
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
            f"use one or more of {OPERATIONS}",
        )
        check(0 <= self.slips < 1, "slips", self.slips, "must be in [0, 1)")
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
    """Reward-model overoptimization on short reviews, and two ways to control it.

    PPO with several KL coefficients and best-of-n optimize a reward model trained on
    few pairs. The true reward, hidden from training, shows where more optimization
    stops helping. Reward-model ensembles and early stopping are compared.
    """

    run_dir: str = "runs/overoptimization"
    """directory for all runs, the figure, the numbers and the report. Running the same
    command again resumes; only betas, ensembles, ensemble-beta and patience may change
    then"""
    quickstart: str | None = None
    """run directory of a quickstart whose SFT model, pairs and prompts are used; None:
    run one first, in quickstart/ of the run directory"""
    pairs: int = 1_000
    """preference pairs per reward model; the fewer, the easier it is to exploit"""
    models: int = 4
    """number of reward models; the first is the single model, all form the ensembles"""
    ensemble_pairs: Literal["own", "same"] = "own"
    """own: each reward model is trained on different pairs; same: all on the same pairs
    with different seeds, which makes their errors more correlated"""
    reward_steps: int = 50
    """optimizer steps per reward model, of 64 pairs each"""
    betas: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3)
    """KL coefficients of PPO against the single model"""
    ensembles: tuple[EnsembleScore, ...] = ("worst", "mean-minus-std")
    """ways to combine the reward models' scores; PPO and best-of-n run with each"""
    ensemble_beta: float = 0.0
    """KL coefficient of PPO against ensembles; must be one of betas"""
    ensemble_penalty: float = 1.0
    """λ of mean − λ · standard deviation over the reward models"""
    updates: int = 60
    """PPO updates per run"""
    batch_size: int = 64
    """responses per update"""
    eval_every: int = 3
    """updates between evaluations, the points of a curve"""
    eval_prompts: int = 256
    """held-out prompts per evaluation"""
    best_of_prompts: int = 64
    """held-out prompts for best-of-n"""
    best_of_samples: int = 512
    """N, responses per prompt; best of n is estimated for n = 1, 2, 4 … N / 2"""
    patience: int = 3
    """evaluations without a new best before early stopping"""
    seed: int = 0
    """seed of all randomness, from 0 to 2^57 − 1"""
    quiet: bool = False
    """print only the table"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self, most_seed=MOST_DEMO_SEED)
        check(
            self.pairs >= REWARD_BATCH_SIZE,
            "pairs",
            self.pairs,
            f"must be at least {REWARD_BATCH_SIZE}, the reward model's batch size",
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
            "must be at least 2, for an ensemble",
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
            "must be at least 4, for curves with n = 1, 2",
        )
        check(
            len(set(self.betas)) == len(self.betas)
            and min(self.betas, default=-1) >= 0,
            "betas",
            self.betas,
            "use one or more distinct nonnegative numbers",
        )
        check(
            len(set(self.ensembles)) == len(self.ensembles),
            "ensembles",
            self.ensembles,
            "list each kind once",
        )
        check(
            self.ensemble_beta in self.betas,
            "ensemble-beta",
            self.ensemble_beta,
            f"must be one of betas={self.betas}, for comparison with the single model",
        )
        check(
            self.ensemble_penalty >= 0,
            "ensemble-penalty",
            self.ensemble_penalty,
            "must not be negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """All three stages on short reviews, from scratch, in minutes on a laptop."""

    run_dir: str = "runs/quickstart"
    """directory for the three runs, the table and the summary"""
    seed: int = 0
    """seed of all randomness, from 0 to 2^57 − 1"""
    quiet: bool = False
    """print only the final table"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check_numbers(self, most_seed=MOST_DEMO_SEED)

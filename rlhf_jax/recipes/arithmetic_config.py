"""The configuration of `rlhf-jax arithmetic`.

The string below each field is its help on the command line.
"""

import dataclasses
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.runtime.config import check_positive
from rlhf_jax.tasks.arithmetic import MOST_DIGITS, OPERATIONS

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

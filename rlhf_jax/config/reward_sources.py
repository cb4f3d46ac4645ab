"""Options of rewards, shared by PPO and GRPO.

The string below each field is its command-line help.
"""

import dataclasses

from rlhf_jax.algo.options import check, require_defaults
from rlhf_jax.algo.scores import EnsembleScore
from rlhf_jax.config.reward_limits import LARGEST_REWARD, check_call_limits
from rlhf_jax.config.run import check_positive


def function_name(spec: str) -> str:
    """Name of a reward function in metrics, such as `exact_answer`."""
    return spec.rpartition(":")[2]


# Columns of the samples, and metrics after `reward/`: reward functions are logged there
# under their names.
_TAKEN_NAMES = (
    "step",
    "prompt",
    "response",
    "score",
    "kl",
    "score_mean",
    "score_std",
    "shaped_mean",
    "normalization_mean",
    "normalization_std",
    "greedy_mean",
    "model",
    "failures",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSources:
    """Sources of rewards, in training and on held-out prompts."""

    reward_model: str | None = None
    """Hugging Face directory of a frozen reward model"""
    reward_model_weight: float = 1.0
    """weight of the reward model, or ensemble, relative to reward functions"""
    ensemble: tuple[str, ...] = ()
    """Hugging Face directories of further reward models, forming an ensemble with the
    first"""
    ensemble_score: EnsembleScore = "worst"
    """score of an ensemble: the mean, the lowest, or the mean minus ensemble-penalty
    standard deviations; its models need a common zero (center-coef of rlhf-jax
    reward)"""
    ensemble_penalty: float = 1.0
    """standard deviations subtracted by mean-minus-std"""
    reward: tuple[str, ...] = ()
    """reward functions, file.py:function or package.module:function, called as
    function(prompts, responses, columns) and returning a number per row; columns holds
    the other columns of the data. rlhf_jax.tasks.verifiable has exact_answer and
    reasoning_format"""
    reward_weights: tuple[float, ...] = ()
    """weights of the reward functions in the sum; empty: 1 each"""
    reward_columns: tuple[str, ...] = ()
    """columns of the data passed to reward functions, required in every row; empty:
    those that are not null in the first row"""
    reward_processes: int = 2
    """worker processes for reward functions"""
    reward_time_limit: float = 5.0
    """seconds before a reward function call fails"""
    reward_memory_limit: float | None = None
    """GiB of address space before a reward function call fails, per process and with
    libraries; None: no limit"""
    reward_on_failure: float | None = None
    """score of responses on which a reward function fails; None: stop the run"""
    eval_reward: tuple[str, ...] = ()
    """reward functions evaluated on held-out responses only"""
    eval_samples: int = 1
    """responses per held-out prompt"""
    eval_pass: float | None = 1.0
    """lowest score at which a held-out response passes, by the first function of
    eval-reward, else of reward; None: no pass rates"""
    early_stop: str | None = None
    """held-out metric for early stopping, higher is better, such as eval/score_mean or
    eval/reward/exact_answer; saves the best policy. None: save the last one"""
    early_stop_patience: int = 3
    """evaluations without a new best before training ends"""

    def validate_rewards(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(
            self.reward_model is not None or bool(self.reward),
            "reward-model",
            None,
            "no reward given; set reward-model (a directory) or reward "
            "(functions, file.py:function)",
        )
        check(
            0 < abs(self.reward_model_weight) <= LARGEST_REWARD,
            "reward-model-weight",
            self.reward_model_weight,
            f"must be nonzero, from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}; to "
            "disable the reward model, leave it out",
        )
        if self.reward_model is None:
            why = "requires --reward-model"
            require_defaults(self, "", "reward_model_weight", "ensemble", why=why)
        if not self.ensemble:
            why = "requires an ensemble; add reward models with --ensemble"
            require_defaults(self, "", "ensemble_score", why=why)
        if self.ensemble_score != "mean-minus-std":
            why = "requires ensemble-score=mean-minus-std"
            require_defaults(self, "", "ensemble_penalty", why=why)
        check(
            self.ensemble_penalty >= 0,
            "ensemble-penalty",
            self.ensemble_penalty,
            "must not be negative",
        )
        self._check_functions()
        check_positive(
            eval_samples=self.eval_samples,
            early_stop_patience=self.early_stop_patience,
        )
        if self.early_stop is None:
            why = "has no effect without early-stop"
            require_defaults(self, "", "early_stop_patience", why=why)

    def _check_functions(self) -> None:
        if not self.reward and not self.eval_reward:
            why = "requires a reward function; there are none"
            of_functions = ("columns", "processes", "time_limit", "memory_limit")
            of_functions = [f"reward_{name}" for name in (*of_functions, "on_failure")]
            require_defaults(self, "", *of_functions, "eval_pass", why=why)
        check(
            len(self.reward_weights) in (0, len(self.reward)),
            "reward-weights",
            self.reward_weights,
            f"give one for each of the {len(self.reward)} reward functions",
        )
        names = [function_name(spec) for spec in (*self.reward, *self.eval_reward)]
        twice = [name for name in names if names.count(name) > 1]
        check(
            not twice,
            "reward",
            twice[:1],
            "two functions have this name, which metrics use; rename one",
        )
        taken = [name for name in names if name in _TAKEN_NAMES]
        check(
            not taken,
            "reward",
            taken[:1],
            "is already the name of a metric or sample column; rename the function",
        )
        check_positive(reward_processes=self.reward_processes)
        check_call_limits(self.reward_time_limit, self.reward_memory_limit)
        bounds = f"from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
        check(
            all(abs(weight) <= LARGEST_REWARD for weight in self.reward_weights),
            "reward-weights",
            self.reward_weights,
            f"must be numbers {bounds}",
        )
        check(
            self.reward_on_failure is None
            or abs(self.reward_on_failure) <= LARGEST_REWARD,
            "reward-on-failure",
            self.reward_on_failure,
            f"must be a number {bounds}, or None",
        )

"""Notices a policy that has collapsed, from the metrics of `ppo` and `grpo`."""

from collections.abc import Mapping

from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.policy import function_name
from rlhf_jax.config.ppo import PPOConfig

PATIENCE = 10
"""consecutive updates before a sign is named"""
LOW_ENTROPY = 1e-3
"""nats per token; a policy that solves a task with short answers may have 0.03"""
SOLVED = 0.05
"""A policy whose mean score is this close to passing, as a share, is no collapse: its
responses may rightly be certain, alike and equally good. Far above, the threshold is no
limit of the reward, such as 1 for a count of words, and says nothing."""

ADVICE = {
    "entropy": "the entropy is near zero, so the policy no longer explores: lower the "
    "learning rate, or raise kl.coef, policy-loss.entropy-coef or temperature",
    "alike": "all responses of a batch are alike, so there is nothing to compare: look "
    "at samples.jsonl, lower the learning rate or raise kl.coef",
    "endless": "no response has a stop token: raise max-new-tokens, check stop and the "
    "policy's EOS, or penalize a missing one with scores.missing-eos",
    "empty": "every response ends at once, with its first token: check the reward of "
    "empty responses in samples.jsonl, lower the learning rate or raise kl.coef",
    "spread": "all responses that are compared have the same score, so nothing can be "
    "learned: check the reward, or use easier or harder prompts",
}
"""What each sign means, and what to try."""


class CollapseWatch:
    """Names each sign of a collapse once, when it has lasted for some updates.

    Args:
        config: configuration of the run.
    """

    def __init__(self, config: PPOConfig | GRPOConfig):
        self._config = config
        self._lasted = dict.fromkeys(ADVICE, 0)

    def see(self, metrics: Mapping[str, float]) -> list[str]:
        """Lines to print after an update with these metrics; usually none."""
        signs = set() if self._is_solved(metrics) else self._signs(metrics)
        lines = []
        for sign, lasted in self._lasted.items():
            if lasted < PATIENCE:  # else it was named
                self._lasted[sign] = lasted + 1 if sign in signs else 0
                if self._lasted[sign] == PATIENCE:
                    lines.append(f"for {PATIENCE} updates, {ADVICE[sign]} (shown once)")
        return lines

    def _signs(self, metrics: Mapping[str, float]) -> set[str]:
        """The signs of one update; a metric that is missing is no sign."""
        of = metrics.get
        stops = of("response/stop_rate", 0.5)
        can_be_longer = self._config.max_new_tokens > 1
        # A rounding error of the mean is no spread.
        rounding = 1e-6 * abs(of("reward/score_mean", 0.0))
        is_compared = self._config.batch_size > 1
        found = {
            "entropy": of("policy/entropy", 1.0) < LOW_ENTROPY,
            "alike": of("response/distinct", 1.0) <= 1 / self._config.batch_size
            and is_compared,
            "endless": stops == 0 and can_be_longer,
            "empty": stops == 1
            and of("response/length_mean", 2.0) <= 1
            and can_be_longer,
            "spread": of("group/no_signal", 0.0) == 1
            or (of("reward/score_std", 1.0) <= rounding and is_compared),
        }
        return {sign for sign, is_there in found.items() if is_there}

    def _is_solved(self, metrics: Mapping[str, float]) -> bool:
        """Whether the first reward function gives about what passes, on average."""
        config = self._config
        if not config.reward or config.eval_pass is None:
            return False
        score = metrics.get(f"reward/{function_name(config.reward[0])}", -float("inf"))
        return abs(score - config.eval_pass) <= SOLVED * abs(config.eval_pass)

"""The details on which implementations of PPO and its relatives differ, by name.

Each field is a keyword of a function beside this file, where its formula, its source
and advice are; the string below it is its help on the command line. These classes are
what `make_experience`, `make_group_experience` and the objectives take, and what
presets are made of.
"""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rlhf_jax.algo.kl import KLEstimator
from rlhf_jax.algo.masking import Aggregation
from rlhf_jax.algo.off_policy import SAMPLER_BOUNDS, SamplerLevel
from rlhf_jax.algo.rewards import ScorePosition


def check(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Raises ValueError `field=value: remedy` unless the condition holds."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {remedy}")


class Options:
    """What they have in common: a misspelt choice fails where it is made."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = vars(self)[name]
            if get_origin(kind) is Literal and value not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name}={value!r}: expected one of {choices}")

    def require_defaults(self, name: str, *fields: str, why: str) -> None:
        """Raises ValueError for the first field that is set but would do nothing."""
        defaults = vars(type(self)())
        for field in fields:
            value, default = vars(self)[field], defaults[field]
            flag = f"{name}.{field.replace('_', '-')}"
            check(value == default, flag, value, f"{why}; leave it at {default}")

    def require_positive(self, name: str, *fields: str) -> None:
        """Raises ValueError for the first field that is neither None nor above 0."""
        for field in fields:
            value = vars(self)[field]
            flag = f"{name}.{field.replace('_', '-')}"
            check(value is None or value > 0, flag, value, "must be above 0, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLOptions(Options):
    """The penalty that keeps the policy near the reference."""

    place: Literal["reward", "loss", "none"] = "reward"
    """in the token rewards, where the critic sees it; as a term of the loss, where its
    weight beside whitened advantages is β times their deviation; or nowhere, and then
    the reference is not run"""
    coef: float = 0.05
    """β, nats to reward; the start of an adaptive one"""
    estimator: KLEstimator = "k1"
    """of the per-token KL; in the reward only k1 has the right gradient; in the loss
    k2, or any with kl.straight-through, has that of each token's KL"""
    straight_through: bool = False
    """the estimator's value with the gradient of k2; for kl.place=loss"""
    importance_weighted: bool = False
    """weigh each token's KL by π/π_old, so that its gradient stays that of the KL after
    the first optimizer step of an update; for kl.place=loss; with the gradient of k2
    whatever the estimator, so that kl.clamp bounds the value alone"""
    log_ratio_clamp: float | None = None
    """bound on |log π − log π_ref| before the estimator; None: none"""
    clamp: float | None = None
    """bound on the estimate; None: none"""
    target: float | None = None
    """adapt β so that the observed KL goes to this many nats; None: β is fixed"""
    unit: Literal["sequence-sum", "token-mean"] = "sequence-sum"
    """what kl.target is compared with: KL summed over an answer, or per token"""
    horizon: int = 10_000
    """episodes over which an adaptive β corrects"""

    @property
    def adapts(self) -> bool:
        """Whether β follows the observed KL."""
        return self.place != "none" and self.target is not None

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        why = "must be a finite number, not negative"
        check(0 <= self.coef < math.inf, f"{name}.coef", self.coef, why)
        if self.place == "none":  # switches off whatever a preset had set
            return
        self.require_positive(name, "log_ratio_clamp", "clamp")
        if self.place == "reward":
            why = f"changes a gradient, so it needs {name}.place=loss"
            in_loss = ("straight_through", "importance_weighted")
            self.require_defaults(name, *in_loss, why=why)
        check(
            self.place == "reward" or self.estimator != "k1" or self.straight_through,
            f"{name}.estimator",
            self.estimator,
            f"has an expected gradient of 0 in the loss; take {name}.estimator=k2, or "
            f"add {name}.straight-through",
        )
        if self.target is None:
            why = f"does nothing without {name}.target"
            self.require_defaults(name, "unit", "horizon", why=why)
            return
        check(self.target > 0, f"{name}.target", self.target, "must be positive")
        why = f"an adaptive coefficient ({name}.target) multiplies it: start above 0"
        check(self.coef > 0, f"{name}.coef", self.coef, why)
        check(self.horizon >= 1, f"{name}.horizon", self.horizon, "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """From the score of an answer to its token rewards."""

    normalization: Literal["none", "reference", "running"] = "none"
    """subtract mean and divide by standard deviation: of the reference's answers
    before training, or of all answers so far"""
    clip: float | None = None
    """bound on |score|, after normalisation; None: none"""
    missing_eos: Literal["keep", "subtract", "replace", "scale", "mask"] = "keep"
    """what happens to an answer without a stop token: nothing; its score loses the
    penalty, is the penalty, or is multiplied by it; or it is left out of the losses"""
    missing_eos_penalty: float = 1.0
    """what subtract takes off, replace puts in place, and scale multiplies by"""
    overlong_buffer: int | None = None
    """tokens before the limit over which a score falls linearly; None: no ramp"""
    overlong_penalty: float = 1.0
    """what an answer that reaches the limit loses by the ramp"""
    position: ScorePosition = "last_token"
    """where the score is paid: on the last real token, or in the state after it"""
    end_value: Literal["learned", "kept", "zero"] = "learned"
    """value of the state after the last token, where the score is paid there: the
    critic's, and trained; the critic's, but not trained; or 0"""
    whiten_rewards: bool = False
    """scale token rewards of a batch to variance 1, keeping their mean; where answers
    differ in length, that adds a constant per token"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        self.require_positive(name, "clip", "overlong_buffer", "overlong_penalty")
        penalty, field = self.missing_eos_penalty, f"{name}.missing-eos-penalty"
        if self.missing_eos == "replace":
            check(
                penalty <= 0,
                field,
                penalty,
                f"takes the place of the score under {name}.missing-eos=replace, so it "
                "must be 0 or below",
            )
        elif self.missing_eos == "scale":
            check(0 <= penalty < 1, field, penalty, "must lie in [0, 1) to scale by")
        elif self.missing_eos == "subtract":
            check(penalty > 0, field, penalty, "must be positive to be subtracted")
        else:
            why = f"does nothing under {name}.missing-eos={self.missing_eos}"
            self.require_defaults(name, "missing_eos_penalty", why=why)
        if self.overlong_buffer is None:
            why = f"does nothing without {name}.overlong-buffer"
            self.require_defaults(name, "overlong_penalty", why=why)
        if self.position == "last_token":
            why = f"is of a state that {name}.position=last_token does not have"
            self.require_defaults(name, "end_value", why=why)

    def validate_without_critic(self, name: str) -> None:
        """Raises ValueError naming the field that only a critic gives a meaning."""
        self.validate(name)
        of_critics = ("position", "whiten_rewards")
        why = "is for PPO, which has a critic"
        self.require_defaults(name, *of_critics, why=why)
        why = "is for PPO; without a critic groups.scale sets the scale"
        self.require_defaults(name, "normalization", why=why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageOptions(Options):
    """From token rewards and values to advantages and value targets."""

    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """λ of generalized advantage estimation"""
    value_lam: float | None = None
    """λ of the value targets; None: that of the advantages"""
    lam_alpha: float | None = None
    """in place of λ, one per answer: 1 − 1 / (α · length); None: λ"""
    n_steps: int | None = None
    """advantages from the next n rewards and the critic after them; None: GAE"""
    bootstrap_truncated: bool = False
    """an answer that was cut off is worth the critic's value of its end, in place of
    its score; for scores.missing-eos=keep"""
    slow_critic_decay: float | None = None
    """bootstrap from a copy of the critic that keeps this share of itself at every
    update, such as 0.9; None: from the critic itself"""
    whiten: Literal["batch", "shard", "minibatch", "none"] = "batch"
    """over which tokens advantages are scaled to variance 1"""
    whiten_shards: int = 1
    """parts of the batch, for advantages.whiten=shard"""
    center: bool = True
    """whitened advantages have mean 0"""
    ddof: Literal[0, 1] = 0
    """1: unbiased variance in whitening"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        for field in ("gamma", "lam", "value_lam", "slow_critic_decay"):
            value = vars(self)[field]
            flag = f"{name}.{field.replace('_', '-')}"
            check(value is None or 0 <= value <= 1, flag, value, "must lie in [0, 1]")
        self.require_positive(name, "lam_alpha", "n_steps")
        if self.lam_alpha is not None:
            why = f"gives way to {name}.lam-alpha"
            self.require_defaults(name, "lam", why=why)
        if self.n_steps is not None:
            of_gae = ("lam", "value_lam", "lam_alpha", "slow_critic_decay")
            why = f"does not go with {name}.n-steps"
            self.require_defaults(name, *of_gae, "bootstrap_truncated", why=why)
        if self.whiten == "none":
            why = f"does nothing under {name}.whiten=none"
            self.require_defaults(name, "center", "ddof", why=why)
        check(
            (self.whiten_shards > 1) == (self.whiten == "shard"),
            f"{name}.whiten-shards",
            self.whiten_shards,
            f"must be above 1 with {name}.whiten=shard, and 1 without",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """From scores to advantages without a critic."""

    baseline: Literal[
        "mean", "leave-one-out", "length-weighted", "greedy", "best-of-others", "none"
    ] = "leave-one-out"
    """what a score is compared with: the mean of its group (GRPO), of the others in it
    (RLOO), weighted by length (OPO); the score of the likeliest answer (ReMax); the
    best of the others (for pass@k); or nothing (REINFORCE)"""
    scale: Literal["std", "batch-std", "tokens", "signal", "none"] = "none"
    """what that is divided by: the standard deviation of its group (GRPO as published),
    of the batch, or over all tokens, after centring there (REINFORCE++); the share of
    groups with a signal (GPG); or nothing (Dr. GRPO, RLOO)"""
    gamma: float = 1.0
    """discount per token; for baselines greedy and none, where rewards keep their
    place in the answer"""
    ddof: Literal[0, 1] = 1
    """1: unbiased variance in the scale"""

    @property
    def compares(self) -> bool:
        """Whether answers are compared with others to the same prompt."""
        return self.baseline not in ("greedy", "none")

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        scales = {
            "mean": ("std", "batch-std", "tokens", "signal", "none"),
            "leave-one-out": ("std", "batch-std", "tokens", "none"),
            "length-weighted": ("tokens", "none"),
            "greedy": ("tokens", "none"),
            "best-of-others": ("std", "none"),
            "none": ("tokens", "none"),
        }[self.baseline]
        check(
            self.scale in scales,
            f"{name}.scale",
            self.scale,
            f"with {name}.baseline={self.baseline} take one of {', '.join(scales)}",
        )
        check(0 <= self.gamma <= 1, f"{name}.gamma", self.gamma, "must lie in [0, 1]")
        if self.compares:
            why = f"does nothing with {name}.baseline={self.baseline}"
            self.require_defaults(name, "gamma", why=why)
        if self.scale in ("signal", "none"):
            why = f"does nothing with {name}.scale={self.scale}"
            self.require_defaults(name, "ddof", why=why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossOptions(Options):
    """The surrogate loss of the actor."""

    surrogate: Literal["ppo", "gspo", "gmpo", "cispo", "sapo", "reinforce"] = "ppo"
    """PPO's clip of each token's ratio; one clipped ratio per answer (gspo); the
    geometric mean of clipped ones (gmpo); bounded weights that silence no token
    (cispo); a soft gate (sapo); no ratio at all (reinforce). gspo and gmpo want
    aggregation seq-mean-token-mean"""
    ratio_bound: float | None = None
    """largest weight of a token, for policy-loss.surrogate=cispo; None: 5"""
    clip_eps: float | None = None
    """ε of the policy ratio; None: 0.2 for ppo, 3e-4 below 1 and 4e-4 above for gspo,
    0.4 for gmpo"""
    clip_eps_high: float | None = None
    """ε above 1; None: that of policy-loss.clip-eps where it is given, else the
    surrogate's own"""
    dual_clip: float | None = None
    """bound on the ratio of tokens with a negative advantage; None: none"""
    log_ratio_clamp: float | None = None
    """bound on |log π − log π_old|; None: none"""
    aggregation: Aggregation = "token-mean"
    """how token losses, of critic and actor, become one number; seq-mean-token-sum-norm
    divides each answer's sum by the limit of answers, as Dr. GRPO does"""
    mean_of_means: bool = False
    """average each microbatch by itself and then the averages: the result depends on
    the number of microbatches"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """importance weights against a numerical mismatch of sampler and trainer: bounded,
    or 0 beyond the bound"""
    sampler_level: SamplerLevel = "token"
    """one such weight per token, or one per answer: the product of its tokens'
    (sequence), or their geometric mean"""
    sampler_bound: float | None = None
    """largest such weight; None: 2 per token, 3 for sequence, 1.01 for geometric"""
    sampler_lower_bound: float | None = None
    """smallest such weight; None: 0, or 0.99 for geometric"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        of_ratios = ("clip_eps", "clip_eps_high", "log_ratio_clamp", "ratio_bound")
        self.require_positive(name, *of_ratios)
        under = f"under {name}.surrogate={self.surrogate}"
        if self.surrogate != "ppo":
            of_ppo = ("dual_clip", "log_ratio_clamp")
            self.require_defaults(name, *of_ppo, why=f"does nothing {under}")
        if self.surrogate in ("cispo", "sapo", "reinforce"):
            of_clips = ("clip_eps", "clip_eps_high")
            self.require_defaults(name, *of_clips, why=f"clips nothing {under}")
        if self.surrogate != "cispo":
            self.require_defaults(name, "ratio_bound", why=f"does nothing {under}")
        check(
            self.dual_clip is None or self.dual_clip > 1,
            f"{name}.dual-clip",
            self.dual_clip,
            "must be above 1, or None",
        )
        if self.aggregation == "token-sum":
            why = f"does nothing under {name}.aggregation=token-sum"
            self.require_defaults(name, "mean_of_means", why=why)
        flag, coef = f"{name}.entropy-coef", self.entropy_coef
        check(0 <= coef < math.inf, flag, coef, "must be finite and not negative")
        if self.sampler_correction == "none":
            of_weights = ("sampler_level", "sampler_bound", "sampler_lower_bound")
            why = f"does nothing without {name}.sampler-correction"
            self.require_defaults(name, *of_weights, why=why)
        given = (self.sampler_lower_bound, self.sampler_bound)
        defaults = SAMPLER_BOUNDS[self.sampler_level]
        lowest, largest = (
            default if bound is None else bound
            for bound, default in zip(given, defaults, strict=True)
        )
        check(
            0 <= lowest < largest,
            f"{name}.sampler-lower-bound",
            lowest,
            f"must lie between 0 and {name}.sampler-bound={largest}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueLossOptions(Options):
    """The squared error of the critic."""

    clip_eps: float | None = 0.2
    """ε of the value clip; None: plain squared error"""
    coef: float = 1.0
    """weight beside the policy loss; with networks of their own, and Adam, it changes
    little but what max-grad-norm and Adam's epsilon see"""
    half: bool = True
    """½ of the squared error"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        self.require_positive(name, "clip_eps")
        check(self.coef > 0, f"{name}.coef", self.coef, "must be above 0")


def check_bootstrap(advantages: AdvantageOptions, scores: ScoreOptions) -> None:
    """Raises ValueError where a cut-off answer would be paid twice, or fined too."""
    if not advantages.bootstrap_truncated:
        return
    why = (
        "is for the scores of cut-off answers, which advantages.bootstrap-truncated "
        "replaces by the critic's value of what was still to come"
    )
    scores.require_defaults("scores", "missing_eos", "overlong_buffer", why=why)
    why = (
        "does not go with advantages.bootstrap-truncated: a value has no whitened form"
    )
    scores.require_defaults("scores", "whiten_rewards", why=why)

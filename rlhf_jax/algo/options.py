"""Named options for the details on which implementations differ.

Each field is a keyword of a function in this package, which documents its formula,
source and usage; the string below it is its command-line help. `make_experience`,
`make_group_experience`, the objectives and presets use these classes.
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


def require_defaults(options: Any, prefix: str, *fields: str, why: str) -> None:
    """Raises ValueError for the first field that is set but would do nothing.

    Args:
        options: a dataclass.
        prefix: of its flags, such as `"scores"`, or `""`.
        fields: names of its fields.
        why: they would do nothing.
    """
    declared = {field.name: field for field in dataclasses.fields(options)}
    for name in fields:
        field, value = declared[name], vars(options)[name]
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        flag = f"{prefix}.".lstrip(".") + name.replace("_", "-")
        check(value == default, flag, value, f"{why}; leave it at {default}")


class Options:
    """Base class: invalid choices raise at construction."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = vars(self)[name]
            if get_origin(kind) is Literal and value not in get_args(kind):
                choices = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name}={value!r}: expected one of {choices}")

    def require_positive(self, name: str, *fields: str) -> None:
        """Raises ValueError for the first field that is neither None nor above 0."""
        for field in fields:
            value = vars(self)[field]
            flag = f"{name}.{field.replace('_', '-')}"
            check(value is None or value > 0, flag, value, "must be above 0, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLOptions(Options):
    """The KL penalty."""

    place: Literal["reward", "loss", "none"] = "reward"
    """in the token rewards, where the critic sees it; in the loss, where with whitened
    advantages its effective weight is β times their standard deviation; or none, then
    the reference is not run"""
    coef: float = 0.05
    """β; the initial value if adaptive"""
    estimator: KLEstimator = "k1"
    """estimator of the per-token KL; in the reward only k1 has the correct gradient; in
    the loss k2, or any with kl.straight-through, has the gradient of the token-wise
    KL"""
    straight_through: bool = False
    """the estimator's value with the gradient of k2; for kl.place=loss"""
    importance_weighted: bool = False
    """weight each token's KL by π/π_old, so that its gradient is also correct after the
    first optimizer step of an update; for kl.place=loss; uses the gradient of k2 for
    any estimator, so kl.clamp only bounds the value"""
    log_ratio_clamp: float | None = None
    """bound on |log π − log π_ref| before the estimator; None: no bound"""
    clamp: float | None = None
    """bound on the estimate; None: no bound"""
    target: float | None = None
    """target KL in nats for an adaptive β; None: β is fixed"""
    unit: Literal["sequence-sum", "token-mean"] = "sequence-sum"
    """unit of kl.target: KL summed over a response, or per token"""
    horizon: int = 10_000
    """horizon of an adaptive β, in episodes"""

    @property
    def adapts(self) -> bool:
        """Whether β is adaptive."""
        return self.place != "none" and self.target is not None

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        why = "must be finite and not negative"
        check(0 <= self.coef < math.inf, f"{name}.coef", self.coef, why)
        if self.place == "none":  # disables whatever a preset has set
            return
        self.require_positive(name, "log_ratio_clamp", "clamp")
        if self.place == "reward":
            why = f"changes a gradient, so it needs {name}.place=loss"
            in_loss = ("straight_through", "importance_weighted")
            require_defaults(self, name, *in_loss, why=why)
        check(
            self.place == "reward" or self.estimator != "k1" or self.straight_through,
            f"{name}.estimator",
            self.estimator,
            f"has an expected gradient of 0 in the loss; use {name}.estimator=k2, or "
            f"add {name}.straight-through",
        )
        if self.target is None:
            why = f"has no effect without {name}.target"
            require_defaults(self, name, "unit", "horizon", why=why)
            return
        check(self.target > 0, f"{name}.target", self.target, "must be positive")
        why = f"an adaptive coefficient ({name}.target) multiplies it: start above 0"
        check(self.coef > 0, f"{name}.coef", self.coef, why)
        check(self.horizon >= 1, f"{name}.horizon", self.horizon, "must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """From scores to token rewards."""

    normalization: Literal["none", "reference", "running"] = "none"
    """subtract the mean and divide by the standard deviation: of the reference's
    responses before training, or of all responses so far"""
    clip: float | None = None
    """bound on |score|, after normalization; None: no bound"""
    missing_eos: Literal["keep", "subtract", "replace", "scale", "mask"] = "keep"
    """for responses without a stop token: keep the score; subtract the penalty, replace
    by it, or multiply by it; or mask them from the losses"""
    missing_eos_penalty: float = 1.0
    """the penalty for subtract, the score for replace, the factor for scale"""
    overlong_buffer: int | None = None
    """length of the linear penalty ramp before the limit, in tokens; None: no ramp"""
    overlong_penalty: float = 1.0
    """penalty of the ramp at the limit"""
    position: ScorePosition = "last_token"
    """position of the score: on the last real token, or in the state after it"""
    end_value: Literal["learned", "kept", "zero"] = "learned"
    """value of the state after the last token, if the score is there: the critic's,
    trained; the critic's, not trained; or 0"""
    whiten_rewards: bool = False
    """scale token rewards of a batch to variance 1, keeping their mean; if responses
    differ in length, this adds a constant per token"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        self.require_positive(name, "clip", "overlong_buffer", "overlong_penalty")
        penalty, field = self.missing_eos_penalty, f"{name}.missing-eos-penalty"
        if self.missing_eos == "replace":
            check(
                penalty <= 0,
                field,
                penalty,
                f"replaces the score under {name}.missing-eos=replace, so it must be "
                "0 or below",
            )
        elif self.missing_eos == "scale":
            check(0 <= penalty < 1, field, penalty, "must be in [0, 1) to scale by")
        elif self.missing_eos == "subtract":
            check(penalty > 0, field, penalty, "must be positive to be subtracted")
        else:
            why = f"has no effect with {name}.missing-eos={self.missing_eos}"
            require_defaults(self, name, "missing_eos_penalty", why=why)
        if self.overlong_buffer is None:
            why = f"has no effect without {name}.overlong-buffer"
            require_defaults(self, name, "overlong_penalty", why=why)
        if self.position == "last_token":
            why = f"has no effect with {name}.position=last_token"
            require_defaults(self, name, "end_value", why=why)

    def validate_without_critic(self, name: str) -> None:
        """Raises ValueError naming the field that requires a critic."""
        self.validate(name)
        of_critics = ("position", "whiten_rewards")
        why = "requires a critic"
        require_defaults(self, name, *of_critics, why=why)
        why = "requires a critic; use groups.scale to set the scale"
        require_defaults(self, name, "normalization", why=why)


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
    """instead of λ, one per response: 1 − 1 / (α · length); None: λ"""
    n_steps: int | None = None
    """n-step advantages, bootstrapped by the critic; None: GAE"""
    bootstrap_truncated: bool = False
    """replace the score of a truncated response by the critic's value at its end; for
    scores.missing-eos=keep"""
    slow_critic_decay: float | None = None
    """decay per update of the slow critic used for bootstrapping, such as 0.9; None:
    bootstrap from the critic"""
    whiten: Literal["batch", "shard", "minibatch", "none"] = "batch"
    """set of tokens over which advantages are whitened"""
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
            check(value is None or 0 <= value <= 1, flag, value, "must be in [0, 1]")
        self.require_positive(name, "lam_alpha", "n_steps")
        if self.lam_alpha is not None:
            why = f"has no effect with {name}.lam-alpha"
            require_defaults(self, name, "lam", why=why)
        if self.n_steps is not None:
            of_gae = ("lam", "value_lam", "lam_alpha", "slow_critic_decay")
            why = f"cannot be combined with {name}.n-steps"
            require_defaults(self, name, *of_gae, "bootstrap_truncated", why=why)
        if self.whiten == "none":
            why = f"has no effect with {name}.whiten=none"
            require_defaults(self, name, "center", "ddof", why=why)
        shards = self.whiten_shards
        check(shards >= 1, f"{name}.whiten-shards", shards, "must be at least 1")
        check(
            (shards > 1) == (self.whiten == "shard"),
            f"{name}.whiten-shards",
            shards,
            f"must be above 1 with {name}.whiten=shard, and 1 without",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """From scores to advantages without a critic."""

    baseline: Literal[
        "mean", "leave-one-out", "length-weighted", "greedy", "best-of-others", "none"
    ] = "leave-one-out"
    """baseline of a score: the mean of its group (GRPO), of the others in it (RLOO),
    weighted by length (OPO); the score of the greedy response (ReMax); the best of the
    others (for pass@k); or none (REINFORCE)"""
    scale: Literal["std", "batch-std", "tokens", "signal", "none"] = "none"
    """divisor of advantages: the standard deviation of the group (GRPO as published),
    of the batch, or over all tokens, after centering (REINFORCE++); the share of groups
    with nonzero variance (GPG); or none (Dr. GRPO, RLOO)"""
    gamma: float = 1.0
    """discount per token; for baselines greedy and none, which use rewards-to-go"""
    ddof: Literal[0, 1] = 1
    """1: unbiased variance in the scale"""

    @property
    def compares(self) -> bool:
        """Whether responses are compared to others to the same prompt."""
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
            f"with {name}.baseline={self.baseline} use one of {', '.join(scales)}",
        )
        check(0 <= self.gamma <= 1, f"{name}.gamma", self.gamma, "must be in [0, 1]")
        if self.compares:
            why = f"has no effect with {name}.baseline={self.baseline}"
            require_defaults(self, name, "gamma", why=why)
        if self.scale in ("signal", "none"):
            why = f"has no effect with {name}.scale={self.scale}"
            require_defaults(self, name, "ddof", why=why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossOptions(Options):
    """The surrogate loss of the actor."""

    surrogate: Literal["ppo", "gspo", "gmpo", "cispo", "sapo", "reinforce"] = "ppo"
    """token ratios with PPO's clip; one clipped ratio per response (gspo); the
    geometric mean of clipped ratios (gmpo); clipped weights that keep every token's
    gradient (cispo); a soft gate (sapo); no ratio (reinforce). Use gspo and gmpo with
    aggregation seq-mean-token-mean"""
    ratio_bound: float | None = None
    """largest weight of a token, for policy-loss.surrogate=cispo; None: 5"""
    clip_eps: float | None = None
    """ε of the policy ratio; None: 0.2 for ppo, 3e-4 below 1 and 4e-4 above for gspo,
    0.4 for gmpo"""
    clip_eps_high: float | None = None
    """ε above 1; None: policy-loss.clip-eps if given, else the surrogate's default"""
    dual_clip: float | None = None
    """bound on the ratio of tokens with a negative advantage; None: no bound"""
    log_ratio_clamp: float | None = None
    """bound on |log π − log π_old|; None: no bound"""
    aggregation: Aggregation = "token-mean"
    """reduction of the token losses of critic and actor; seq-mean-token-sum-norm
    divides each response's sum by the maximum response length, as in Dr. GRPO"""
    mean_of_means: bool = False
    """average each microbatch separately, then the averages: the result depends on the
    number of microbatches"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    """importance weights for sampler–trainer mismatch: clipped, or 0 out of bounds"""
    sampler_level: SamplerLevel = "token"
    """one such weight per token, or one per response: the product over its tokens
    (sequence), or their geometric mean"""
    sampler_bound: float | None = None
    """largest such weight; None: 2 per token, 3 for sequence, 1.01 for geometric"""
    sampler_lower_bound: float | None = None
    """smallest such weight; None: 0, or 0.99 for geometric"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        of_ratios = ("clip_eps", "clip_eps_high", "log_ratio_clamp", "ratio_bound")
        self.require_positive(name, *of_ratios)
        under = f"with {name}.surrogate={self.surrogate}"
        if self.surrogate != "ppo":
            of_ppo = ("dual_clip", "log_ratio_clamp")
            require_defaults(self, name, *of_ppo, why=f"has no effect {under}")
        if self.surrogate in ("cispo", "sapo", "reinforce"):
            of_clips = ("clip_eps", "clip_eps_high")
            require_defaults(self, name, *of_clips, why=f"clips nothing {under}")
        if self.surrogate != "cispo":
            require_defaults(self, name, "ratio_bound", why=f"has no effect {under}")
        check(
            self.dual_clip is None or self.dual_clip > 1,
            f"{name}.dual-clip",
            self.dual_clip,
            "must be above 1, or None",
        )
        if self.aggregation == "token-sum":
            why = f"has no effect with {name}.aggregation=token-sum"
            require_defaults(self, name, "mean_of_means", why=why)
        flag, coef = f"{name}.entropy-coef", self.entropy_coef
        check(0 <= coef < math.inf, flag, coef, "must be finite and not negative")
        if self.sampler_correction == "none":
            of_weights = ("sampler_level", "sampler_bound", "sampler_lower_bound")
            why = f"has no effect without {name}.sampler-correction"
            require_defaults(self, name, *of_weights, why=why)
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
            f"must be between 0 and {name}.sampler-bound={largest}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueLossOptions(Options):
    """The squared error of the critic."""

    clip_eps: float | None = 0.2
    """ε of the value clip; None: plain squared error"""
    coef: float = 1.0
    """weight relative to the policy loss; with separate networks and Adam, it only
    matters for max-grad-norm and Adam's epsilon"""
    half: bool = True
    """include the ½ in the squared error"""

    def validate(self, name: str) -> None:
        """Raises ValueError naming the field that cannot work."""
        self.require_positive(name, "clip_eps")
        check(self.coef > 0, f"{name}.coef", self.coef, "must be above 0")


def check_bootstrap(advantages: AdvantageOptions, scores: ScoreOptions) -> None:
    """Raises ValueError if a truncated response would be paid twice, or penalized."""
    if not advantages.bootstrap_truncated:
        return
    why = (
        "applies to the scores of truncated responses, which "
        "advantages.bootstrap-truncated replaces by the critic's value"
    )
    require_defaults(scores, "scores", "missing_eos", "overlong_buffer", why=why)
    why = "cannot be combined with advantages.bootstrap-truncated"
    require_defaults(scores, "scores", "whiten_rewards", why=why)

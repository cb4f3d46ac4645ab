"""Debated options of PPO, each as flags of `rlhf-jax ppo`."""

import dataclasses

import tyro

from rlhf_jax.config.ppo import PPOConfig, PPOMethod
from rlhf_jax.config.ppo_presets import PPO_PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One way of running PPO.

    Attributes:
        name: name on the command line and of its directory.
        title: title in tables and plots.
        flags: changed options; `SFT` is replaced by the SFT model's directory.
        preset: preset that replaces the default method before that.
    """

    name: str
    title: str
    flags: str = ""
    preset: str | None = None

    @property
    def shown_flags(self) -> str:
        """Flags to add to `rlhf-jax ppo` for this case; empty for the default."""
        return self.flags if self.preset is None else f"--preset {self.preset}"

    def configure(self, default: PPOConfig) -> PPOConfig:
        """The default run with this case's method; same models, data and sizes.

        Raises:
            ValueError: the two are incompatible.
        """
        config = default
        if self.preset is not None:
            method = PPO_PRESETS[self.preset]()
            fields = dataclasses.fields(PPOMethod)
            values = {field.name: vars(method)[field.name] for field in fields}
            config = dataclasses.replace(config, **values)
        words = self.flags.split()
        flags = [default.policy if word == "SFT" else word for word in words]
        config = tyro.cli(PPOConfig, args=flags, default=config)
        config.validate()
        return config


DEFAULT = Case(name="default", title="default")

DEBATED = (
    Case(
        name="no-whitening",
        title="advantages not whitened",
        flags="--advantages.whiten none",
    ),
    Case(name="lambda-1", title="λ = 1, not 0.95", flags="--advantages.lam 1"),
    Case(
        name="k3-in-reward",
        title="KL in the reward by k3, not k1",
        flags="--kl.estimator k3",
    ),
    Case(
        name="kl-in-loss",
        title="KL in the loss (k2), same β",
        flags="--kl.place loss --kl.estimator k2",
    ),
    Case(
        name="no-value-clip",
        title="no value clip",
        flags="--value-loss.clip-eps None",
    ),
    Case(
        name="score-after-last",
        title="score after the last token (TRL)",
        flags="--scores.position after_last_token",
    ),
    Case(
        name="critic-from-sft",
        title="critic from the SFT model, fresh head",
        flags="--critic SFT",
    ),
    Case(
        name="no-eos-penalty",
        title="no penalty for a missing EOS",
        flags="--scores.missing-eos keep",
    ),
    Case(name="one-epoch", title="1 epoch, not 4", flags="--epochs 1"),
    Case(
        name="no-ratio-clip",
        title="policy ratio not clipped",
        flags="--policy-loss.clip-eps 1e6",
    ),
)

EXTRAS = (
    Case(
        name="shared-trunk",
        title="critic as a second head on the policy",
        flags="--critic-trunk shared",
    ),
    Case(
        name="adaptive-kl",
        title="β adapted to a KL of 3 nats",
        # A horizon short enough for β to change within a few thousand responses.
        flags="--kl.target 3 --kl.horizon 500",
    ),
    Case(
        name="dual-clip",
        title="dual clip at 3",
        flags="--policy-loss.dual-clip 3",
    ),
    Case(
        name="adam-tf1",
        title="Adam in TensorFlow 1's form",
        flags="--actor-optimizer.form tf1 --critic-optimizer.form tf1",
    ),
    Case(
        name="entropy-bonus",
        title="entropy bonus 0.01",
        flags="--policy-loss.entropy-coef 0.01",
    ),
    Case(
        name="reward-whitening",
        title="token rewards whitened",
        flags="--scores.whiten-rewards",
    ),
)

PRESET_CASES = tuple(
    Case(name=name, title=f"preset {name}", preset=name) for name in PPO_PRESETS
)

GROUPS = {"debated": DEBATED, "extras": EXTRAS, "presets": PRESET_CASES}


def select(names: list[str]) -> list[Case]:
    """The default, and the cases of these names or groups, each once, in order.

    Raises:
        ValueError: for an unknown name.
    """
    known = {DEFAULT.name: (DEFAULT,)} | GROUPS
    known |= {case.name: (case,) for group in GROUPS.values() for case in group}
    for name in names:
        if name not in known:
            raise ValueError(f"--cases {name}: expected some of {', '.join(known)}")
    chosen = [case for name in (DEFAULT.name, *names) for case in known[name]]
    return list(dict.fromkeys(chosen))


def list_cases() -> str:
    """Names, titles and flags of all cases, for `--help`."""
    lines = []
    for group, cases in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {c.name:18}{c.title:40}{c.shown_flags}" for c in cases]
    return "\n".join(lines)

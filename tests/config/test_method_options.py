"""Options of whole methods that cannot work together are refused, by their flags."""

import pytest

from rlhf_jax.algo.options import (
    AdvantageOptions,
    KLOptions,
    PolicyLossOptions,
    ScoreOptions,
)
from rlhf_jax.config.grpo import GRPOMethod
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.config.ppo_presets import PPO_PRESETS

REINFORCE = PolicyLossOptions(surrogate="reinforce")


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        (PPOMethod, {"epochs": 2, "minibatches": 1}),
        (PPOMethod, {"epochs": 1, "minibatches": 2}),
        (GRPOMethod, {"epochs": 2, "minibatches": 1}),
        (GRPOMethod, {"epochs": 1, "minibatches": 2}),
        (GRPOMethod, {"epochs": 1, "minibatches": 1, "refresh_every": 2}),
    ],
)
def test_a_loss_without_a_ratio_takes_one_step_per_rollout(method, sizes):
    with pytest.raises(
        ValueError, match=r"^policy-loss\.surrogate='reinforce': has no"
    ):
        method(policy_loss=REINFORCE, **sizes).validate()
    one = dict.fromkeys(sizes, 1)
    method(policy_loss=REINFORCE, **one).validate()


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"clip_eps": 0.0}, "policy-loss.clip-eps=0.0: must be above 0"),
        ({"ratio_bound": 4.0}, "policy-loss.ratio-bound=4.0: has no effect with"),
        (
            {"sampler_correction": "mask", "sampler_lower_bound": 2.0},
            "policy-loss.sampler-lower-bound=2.0: must be between 0 and "
            "policy-loss.sampler-bound=2.0",
        ),
        (
            {
                "sampler_correction": "mask",
                "sampler_level": "geometric",
                "sampler_bound": 0.5,
            },
            "policy-loss.sampler-lower-bound=0.99: must be between 0 and "
            "policy-loss.sampler-bound=0.5",
        ),
        ({"sampler_level": "sequence"}, "policy-loss.sampler-level='sequence': has"),
    ],
)
def test_options_of_the_loss_that_cannot_work(options, start):
    with pytest.raises(ValueError) as refused:
        PolicyLossOptions(**options).validate("policy-loss")
    assert str(refused.value).startswith(start)


def test_a_weight_on_the_kl_is_for_the_loss():
    KLOptions(place="loss", estimator="k3", importance_weighted=True).validate("kl")
    with pytest.raises(ValueError, match=r"^kl\.importance-weighted=True: changes a g"):
        KLOptions(importance_weighted=True).validate("kl")


def test_beta_adapts_where_there_is_a_kl_and_a_target():
    assert not KLOptions().adapts
    assert KLOptions(target=6.0).adapts
    assert KLOptions(target=6.0, place="loss", estimator="k2").adapts
    assert not KLOptions(target=6.0, place="none").adapts


def test_what_is_cut_off_is_bootstrapped_or_fined():
    cut = AdvantageOptions(bootstrap_truncated=True)
    PPOMethod(advantages=cut).validate()
    fined = ScoreOptions(missing_eos="replace", missing_eos_penalty=-1.0)
    with pytest.raises(ValueError, match=r"^scores\.missing-eos='replace': applies to"):
        PPOMethod(advantages=cut, scores=fined).validate()


def test_presets_that_divide_sums_by_a_constant():
    by_constant = {
        name
        for name, make in GRPO_PRESETS.items()
        if make().policy_loss.aggregation == "seq-mean-token-sum-norm"
    }
    assert by_constant == {"dr_grpo", "rloo", "remax"}


@pytest.mark.parametrize("name", [*PPO_PRESETS, *GRPO_PRESETS])
def test_every_preset_works(name):
    (GRPO_PRESETS | PPO_PRESETS)[name]().validate()


def test_there_is_at_least_one_shard():
    advantages = AdvantageOptions(whiten="none", whiten_shards=0)
    with pytest.raises(ValueError, match="whiten-shards=0: must be at least 1"):
        advantages.validate("advantages")

"""The policy, its frozen reference and the frozen reward models of a run."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.algo.scores import combine_scores
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.interfaces import ActorCriticFn, ScoreFn, ValuesFn
from rlhf_jax.learner.gradients import Assemble
from rlhf_jax.learner.objectives import separate_networks
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.callables import Policy, critic, policy, reward_model, shared_trunk
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.heads import fresh_score
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.rope import DynamicRopeScaling, LongRopeScaling
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.networks import (
    Network,
    Networks,
    assembling,
    check_adapters,
    check_fits,
)
from rlhf_jax.recipes.seeds import seed_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyModels:
    """The models' functions, and frozen parameters."""

    module: Transformer
    policy: Policy
    score_fn: ScoreFn | None  # None: no reward model
    reference: Params | None
    reward: Params | None
    network: Network | None = None  # the policy; None if not trained
    frozen: ActorCritic = dataclasses.field(
        default_factory=lambda: ActorCritic(actor=None, critic=None)
    )
    """base parameters of the adapters of actor and critic"""

    @property
    def lora(self) -> LoraOptions | None:
        """Options of the adapters, if any."""
        return None if self.network is None else self.network.lora

    @property
    def assemble(self) -> Assemble:
        """`(trained, frozen) -> whole`, for actor and critic or one of them."""
        return assembling(self.lora)

    def actor(self, trained: Params) -> Params:
        """The full policy; frozen arrays are shared, not copied."""
        return self.assemble(trained, self.frozen.actor)


def load_policy_models(
    config: PPOConfig | GRPOConfig, networks: Networks
) -> tuple[PolicyModels, Params]:
    """The models of a run, and the policy's trainable parameters.

    Trainable and frozen parameters share no arrays. With adapters the reference is the
    policy without them, unless another is given.
    """
    network, actor = networks.trained(config.policy, "lm")
    reference = None
    if config.kl.place != "none":
        _, reference = networks.frozen(config.reference or config.policy, "lm")
        if config.lora.adapter is not None and config.reference is None:
            # The initial policy, which is not just the base.
            reference = network.whole(jax.tree.map(jnp.copy, actor))
    score_fn = reward = None
    if config.reward_model is not None:
        score_fn, reward = _load_reward_models(config, networks)
    models = PolicyModels(
        module=network.module,
        policy=policy(network.module),
        score_fn=score_fn,
        reference=reference,
        reward=reward,
        network=network,
        frozen=ActorCritic(actor=network.frozen, critic={}),
    )
    return models, actor


def _load_reward_models(
    config: PPOConfig | GRPOConfig, networks: Networks
) -> tuple[ScoreFn, Params]:
    """One score from one or several models, and their parameters."""
    assert config.reward_model is not None
    paths = (config.reward_model, *config.ensemble)
    loaded = [networks.frozen(path, "reward") for path in paths]
    score_fns = [reward_model(module) for module, _ in loaded]
    params = [params for _, params in loaded]
    if len(paths) == 1:
        return score_fns[0], params[0]
    combine = partial(
        combine_scores, how=config.ensemble_score, penalty=config.ensemble_penalty
    )

    def score(params: Params, tokens: Array, mask: Array, /) -> Array:
        pairs = zip(score_fns, params, strict=True)
        return combine(jnp.stack([fn(own, tokens, mask) for fn, own in pairs]))

    return score, params


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourModels(PolicyModels):
    """The functions of all four models, and frozen parameters."""

    forward: ActorCriticFn
    values_fn: ValuesFn  # of the parameters from `critic_of`
    shares_trunk: bool

    def critic_of(self, params: ActorCritic) -> Params:
        """The critic's parameters: its own, or the shared ones of both heads."""
        return params if self.shares_trunk else params.critic


def load_four_models(
    config: PPOConfig, networks: Networks
) -> tuple[FourModels, ActorCritic]:
    """The models of a run, and the trainable parameters of actor and critic.

    The critic is initialized from `critic`, else from the reward model, else from the
    policy with a new head; with adapters, that model's frozen arrays are its base.
    """
    models, actor = load_policy_models(config, networks)
    # Different from the keys that the run derives from its seed.
    head_key = jax.random.fold_in(seed_key(config.seed), 10)
    frozen: Params | None = {}
    if config.critic_trunk == "shared":
        forward, values_fn = shared_trunk(models.module)
        trunk = actor if models.lora is None else models.frozen.actor
        scale = trunk["final_norm"]["scale"]
        critic_params = {"score": networks.make(_float32_head, scale, head_key)}
    else:
        path = config.critic_path
        network, critic_params = networks.trained(
            path,
            "value",
            # A reward model has a head; anything else may be a language model.
            key=None if path == config.reward_model else head_key,
        )
        frozen = network.frozen
        values_fn = critic(network.module)
        forward = separate_networks(
            token_logprobs_fn=models.policy.token_logprobs, values_fn=values_fn
        )
    if config.critic_head_std is not None:
        draw = partial(_drawn_head, stddev=config.critic_head_std)
        drawn = networks.make(draw, critic_params["score"], head_key)
        critic_params = critic_params | {"score": drawn}
    both = dataclasses.replace(models.frozen, critic=frozen)
    four = FourModels(
        **vars(dataclasses.replace(models, frozen=both)),
        forward=forward,
        values_fn=values_fn,
        shares_trunk=config.critic_trunk == "shared",
    )
    return four, ActorCritic(actor=actor, critic=critic_params)


def _float32_head(scale: Array, key: Array) -> Array:
    return fresh_score(scale, key).astype(jnp.float32)


def _drawn_head(score: Array, key: Array, *, stddev: float) -> Array:
    return stddev * jax.random.normal(key, score.shape)


def check_models(
    config: PPOConfig | GRPOConfig, tokenization: Tokenization, *, prompt_width: int
) -> None:
    """Raises ValueError if the models do not match each other or the data.

    Reads configurations and tokenizers, not weights.

    Args:
        config: configuration of the run.
        tokenization: the policy's, which all models must share.
        prompt_width: maximum prompt length, in tokens.
    """
    policy = open_checkpoint(config.policy).config
    needed = prompt_width + config.max_new_tokens
    _check_rope(policy, needed)
    check_adapters(config, policy)
    for name, path in config.models().items():
        checkpoint = open_checkpoint(path)
        shape = checkpoint.config
        if path != config.policy:
            tokenization.check_same_as(Tokenization.load(checkpoint), name, path)
        if name == "critic":
            check_adapters(config, shape)
        if name == "reference" and shape != policy:
            raise ValueError(
                f"reference={path!r}: its shape differs from that of "
                f"policy={config.policy!r}; both run in one program"
            )
        if shape.vocab_size < policy.vocab_size:
            raise ValueError(
                f"{name}: embeddings for {shape.vocab_size} tokens, but the "
                f"policy can sample any of {policy.vocab_size}"
            )
        check_fits(
            shape,
            tokenization,
            needed=needed,
            name=name,
            why=f"prompts of {prompt_width} + max-new-tokens={config.max_new_tokens}",
        )


def _check_rope(policy: DecoderConfig, needed: int) -> None:
    """Raises ValueError if sampling and training would use different rotary angles.

    With some RoPE scalings, the angles of all tokens change once a text exceeds a
    length. The sampler caches rotated keys; training processes the whole text at once.
    """
    scaling = policy.rope.scaling
    if not isinstance(scaling, DynamicRopeScaling | LongRopeScaling):
        return
    if needed > scaling.original_max_positions:
        raise ValueError(
            f"max-prompt-tokens + max-new-tokens allow {needed} tokens, but the "
            "policy's RoPE scaling depends on the text length beyond "
            f"{scaling.original_max_positions}, so sampling and training would "
            "differ; lower the limits"
        )

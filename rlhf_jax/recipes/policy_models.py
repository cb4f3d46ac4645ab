"""The policy, its frozen reference and the frozen reward models of a run."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.scores import combine_scores
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.policy import PolicyConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.interfaces import ActorCriticFn, ScoreFn, ValuesFn
from rlhf_jax.learner.gradients import Assemble
from rlhf_jax.learner.objectives import separate_networks
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.callables import Policy, critic, policy, reward_model, shared_trunk
from rlhf_jax.models.heads import fresh_score
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.rope import DynamicRopeScaling, LongRopeScaling
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.networks import Network, Networks, assembling, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyModels:
    """How to call the models, and the parameters of the frozen ones."""

    module: Transformer
    policy: Policy
    score_fn: ScoreFn | None  # None: no reward model
    reference: Params | None
    reward: Params | None
    network: Network | None = None  # the policy; None where it is not trained
    frozen: ActorCritic = dataclasses.field(
        default_factory=lambda: ActorCritic(actor=None, critic=None)
    )
    """what adapters of actor and critic adapt"""

    @property
    def lora(self) -> LoraOptions | None:
        """Of adapters, if they are what is trained."""
        return None if self.network is None else self.network.lora

    @property
    def assemble(self) -> Assemble:
        """`(trained, frozen) -> whole`, of actor and critic or one of them."""
        return assembling(self.lora)

    def actor(self, trained: Params) -> Params:
        """The whole policy; frozen arrays are shared, not copied."""
        return self.assemble(trained, self.frozen.actor)


def load_policy_models(
    config: PPOConfig | GRPOConfig,
    tokenization: Tokenization,
    networks: Networks,
    *,
    prompt_width: int,
) -> tuple[PolicyModels, Params]:
    """The models, and where what is trained of the policy starts.

    What is trained shares no array with what is frozen. With adapters the reference is
    the policy without them, unless another is named.

    Args:
        config: of the run.
        tokenization: the policy's tokenizer, which must be that of all.
        networks: reads them.
        prompt_width: longest prompt, in tokens.

    Raises:
        ValueError: where the models do not fit each other or the data.
    """
    reference_path = config.reference or config.policy
    check_tokenization(tokenization, "reference", reference_path)
    network, actor = networks.trained(config.policy, "lm")
    module = network.module
    modules = {"policy": module}
    reference = None
    if config.kl.place != "none":
        reference_module, reference = networks.frozen(reference_path, "lm")
        if config.lora.adapter is not None and config.reference is None:
            # The policy's start, which is not the base alone.
            reference = network.whole(jax.tree.map(jnp.copy, actor))
        if reference_module.config != module.config:
            raise ValueError(
                f"reference={reference_path!r}: its shape differs from that of "
                f"policy={config.policy!r}; the two run through one program"
            )
    score_fn = reward = None
    if config.reward_model is not None:
        paths = (config.reward_model, *config.ensemble)
        score_fn, reward, judges = _load_reward_models(
            paths, config, tokenization, networks
        )
        modules |= judges
    check_networks(config, tokenization, modules, prompt_width=prompt_width)
    models = PolicyModels(
        module=module,
        policy=policy(module),
        score_fn=score_fn,
        reference=reference,
        reward=reward,
        network=network,
        frozen=ActorCritic(actor=network.frozen, critic={}),
    )
    return models, actor


def check_tokenization(tokenization: Tokenization, name: str, path: str) -> None:
    """Raises ValueError unless a model has the policy's tokenizer."""
    tokenization.check_same_as(Tokenization.load(path), name, path)


def check_networks(
    config: PolicyConfig,
    tokenization: Tokenization,
    networks: dict[str, Transformer],
    *,
    prompt_width: int,
) -> None:
    """Raises ValueError where a network cannot read what the policy can write.

    Args:
        config: of the run.
        tokenization: the policy's tokenizer.
        networks: by the name of their option; `"policy"` is among them.
        prompt_width: longest prompt, in tokens.
    """
    _check_rope(networks["policy"], prompt_width + config.max_new_tokens)
    vocabulary = networks["policy"].config.vocab_size
    for name, network in networks.items():
        if network.config.vocab_size < vocabulary:
            raise ValueError(
                f"{name}: embeddings for {network.config.vocab_size} tokens, but the "
                f"policy can draw any of {vocabulary}"
            )
        check_fits(
            network,
            tokenization,
            needed=prompt_width + config.max_new_tokens,
            name=name,
            why=f"prompts of {prompt_width} + max-new-tokens={config.max_new_tokens}",
        )


def _check_rope(policy: Transformer, needed: int) -> None:
    """Raises ValueError where sampling and training would turn tokens differently.

    Under some scalings the angles of all tokens change as a text grows past a length.
    A sampler keeps the keys it has turned; training reads the whole text at once.
    """
    scaling = policy.config.rope.scaling
    if not isinstance(scaling, DynamicRopeScaling | LongRopeScaling):
        return
    if needed > scaling.original_max_positions:
        raise ValueError(
            f"max-prompt-tokens + max-new-tokens make up to {needed} tokens, but the "
            "policy's rotary positions change with the length of a text beyond "
            f"{scaling.original_max_positions}, so what is sampled would not be what "
            "is trained; lower the limits"
        )


def _load_reward_models(
    paths: Sequence[str],
    config: PolicyConfig,
    tokenization: Tokenization,
    networks: Networks,
) -> tuple[ScoreFn, Params, dict[str, Transformer]]:
    """One score of one or several models, their parameters, and their networks."""
    score_fns, params, modules = [], [], {}
    for number, path in enumerate(paths):
        name = "reward-model" if number == 0 else f"ensemble {path}"
        check_tokenization(tokenization, name, path)
        module, loaded = networks.frozen(path, "reward")
        score_fns.append(reward_model(module))
        params.append(loaded)
        modules[name] = module
    if len(paths) == 1:
        return score_fns[0], params[0], modules
    combine = partial(
        combine_scores, how=config.ensemble_score, penalty=config.ensemble_penalty
    )

    def score(params: Params, tokens: Array, mask: Array, /) -> Array:
        pairs = zip(score_fns, params, strict=True)
        return combine(jnp.stack([fn(own, tokens, mask) for fn, own in pairs]))

    return score, params, modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourModels(PolicyModels):
    """How to call them, and the parameters of the frozen ones."""

    forward: ActorCriticFn
    values_fn: ValuesFn  # over what `critic_of` gives
    shares_trunk: bool

    def critic_of(self, params: ActorCritic) -> Params:
        """What the critic reads: its own parameters, or those of both heads."""
        return params if self.shares_trunk else params.critic


def load_four_models(
    config: PPOConfig,
    tokenization: Tokenization,
    mesh: Mesh,
    *,
    prompt_width: int,
) -> tuple[FourModels, ActorCritic]:
    """The models, and where what is trained of actor and critic starts.

    What is trained shares no array with what is frozen. The critic starts from
    `critic`, or else from the reward model, or else from the policy under a fresh head;
    with adapters it stands on the frozen arrays of that model.

    Args:
        config: of the run.
        tokenization: the policy's tokenizer, which must be that of all.
        mesh: where the parameters go.
        prompt_width: longest prompt, in tokens.

    Raises:
        ValueError: where the models do not fit each other or the data.
    """
    networks = Networks(config, mesh)
    models, actor = load_policy_models(
        config, tokenization, networks, prompt_width=prompt_width
    )
    frozen: Params | None = {}
    if config.critic_trunk == "shared":
        forward, values_fn = shared_trunk(models.module)
        like = models.actor(actor)["final_norm"]["scale"]
        head = fresh_score(like, _head_key(config))
        critic_params = {"score": head.astype(jnp.float32)}
    else:
        path = config.critic or config.reward_model or config.policy
        check_tokenization(tokenization, "critic", path)
        network, critic_params = networks.trained(
            path,
            "value",
            # A reward model has a head; anything else may be a language model.
            key=None if path == config.reward_model else _head_key(config),
        )
        frozen = network.frozen
        modules = {"policy": models.module, "critic": network.module}
        check_networks(config, tokenization, modules, prompt_width=prompt_width)
        values_fn = critic(network.module)
        forward = separate_networks(
            token_logprobs_fn=models.policy.token_logprobs, values_fn=values_fn
        )
    if config.critic_head_std is not None:
        shape = critic_params["score"].shape
        drawn = config.critic_head_std * jax.random.normal(_head_key(config), shape)
        critic_params = critic_params | {"score": drawn}
    both = dataclasses.replace(models.frozen, critic=frozen)
    four = FourModels(
        **vars(dataclasses.replace(models, frozen=both)),
        forward=forward,
        values_fn=values_fn,
        shares_trunk=config.critic_trunk == "shared",
    )
    return four, ActorCritic(actor=actor, critic=critic_params)


def _head_key(config: PPOConfig) -> Array:
    """Draws the critic's head; none of the keys that the run splits off its seed."""
    return jax.random.fold_in(jax.random.key(config.seed), 10)

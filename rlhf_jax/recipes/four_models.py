"""The four models of PPO: actor and critic, reference and reward model."""

import dataclasses

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.interfaces import ActorCriticFn, ScoreFn, ValuesFn
from rlhf_jax.learner.objectives import separate_networks
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.callables import (
    Policy,
    critic,
    policy,
    reward_model,
    shared_trunk,
)
from rlhf_jax.models.heads import fresh_score
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.configs import PPOConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, frozen_network, trained_network


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourModels:
    """How to call the four, and the parameters of the frozen two."""

    module: Transformer
    policy: Policy
    forward: ActorCriticFn
    values_fn: ValuesFn  # over what `critic_of` gives
    score_fn: ScoreFn
    reference: Params | None
    reward: Params
    shares_trunk: bool

    def critic_of(self, params: ActorCritic) -> Params:
        """What the critic reads: its own parameters, or those of both heads."""
        return params if self.shares_trunk else params.critic


def load_four_models(
    config: PPOConfig,
    language: Language,
    mesh: Mesh,
    *,
    prompt_width: int,
) -> tuple[FourModels, ActorCritic]:
    """The models, and where actor and critic start; no two share an array.

    Args:
        config: of the run.
        language: the policy's tokenizer, which must be that of all.
        mesh: where the parameters go.
        prompt_width: longest prompt, in tokens.

    Raises:
        ValueError: where the models do not fit each other or the data.
    """
    critic_path = config.critic or config.reward_model
    reference_path = config.reference or config.policy
    for name, path in (
        ("reward-model", config.reward_model),
        ("critic", critic_path),
        ("reference", reference_path),
    ):
        language.check_same_as(Language.load(path), name, path)
    module, actor = trained_network(config.policy, config, head="lm", mesh=mesh)
    reference = None
    if config.kl.place != "none":
        reference_module, reference = frozen_network(
            reference_path, config, head="lm", mesh=mesh
        )
        if reference_module.config != module.config:
            raise ValueError(
                f"reference={reference_path!r}: its shape differs from that of "
                f"policy={config.policy!r}; the two run through one program"
            )
    reward_module, reward = frozen_network(
        config.reward_model, config, head="reward", mesh=mesh
    )
    networks = {"policy": module, "reward-model": reward_module}
    shares_trunk = config.critic_trunk == "shared"
    critic_params: Params = {}
    if not shares_trunk:
        networks["critic"], critic_params = trained_network(
            critic_path,
            config,
            head="value",
            mesh=mesh,
            # A reward model has a head; what somebody names may be a language model.
            key=None if config.critic is None else _head_key(config),
        )
    _check_sizes(config, language, networks, prompt_width=prompt_width)

    token_logprobs_fn = policy(module).token_logprobs
    if shares_trunk:
        forward, values_fn = shared_trunk(module)
        like = actor["final_norm"]["scale"]
        critic_params = {"score": fresh_score(like, _head_key(config))}
    else:
        values_fn = critic(networks["critic"])
        forward = separate_networks(
            token_logprobs_fn=token_logprobs_fn, values_fn=values_fn
        )
    if config.critic_head_std is not None:
        shape = critic_params["score"].shape
        drawn = config.critic_head_std * jax.random.normal(_head_key(config), shape)
        critic_params = critic_params | {"score": drawn}
    models = FourModels(
        module=module,
        policy=policy(module),
        forward=forward,
        values_fn=values_fn,
        score_fn=reward_model(reward_module),
        reference=reference,
        reward=reward,
        shares_trunk=shares_trunk,
    )
    return models, ActorCritic(actor=actor, critic=critic_params)


def _head_key(config: PPOConfig) -> Array:
    """Draws the critic's head; none of the keys that the run splits off its seed."""
    return jax.random.fold_in(jax.random.key(config.seed), 10)


def _check_sizes(
    config: PPOConfig,
    language: Language,
    networks: dict[str, Transformer],
    *,
    prompt_width: int,
) -> None:
    """Raises ValueError where a network cannot read what the policy can write."""
    vocabulary = networks["policy"].config.vocab_size
    for name, network in networks.items():
        if network.config.vocab_size < vocabulary:
            raise ValueError(
                f"{name}: embeddings for {network.config.vocab_size} tokens, but the "
                f"policy can draw any of {vocabulary}"
            )
        check_fits(
            network,
            language,
            needed=prompt_width + config.max_new_tokens,
            name=name,
            why=f"prompts of {prompt_width} + max-new-tokens={config.max_new_tokens}",
        )

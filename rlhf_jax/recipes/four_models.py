"""The models of PPO: actor and critic, reference and reward model."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.interfaces import ActorCriticFn, ValuesFn
from rlhf_jax.learner.objectives import separate_networks
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.callables import critic, shared_trunk
from rlhf_jax.models.heads import fresh_score
from rlhf_jax.recipes.adapted import Networks
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.policy_configs import PPOConfig
from rlhf_jax.recipes.policy_models import (
    PolicyModels,
    check_language,
    check_networks,
    load_policy_models,
)


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
    language: Language,
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
        language: the policy's tokenizer, which must be that of all.
        mesh: where the parameters go.
        prompt_width: longest prompt, in tokens.

    Raises:
        ValueError: where the models do not fit each other or the data.
    """
    networks = Networks(config, mesh)
    models, actor = load_policy_models(
        config, language, networks, prompt_width=prompt_width
    )
    frozen: Params | None = {}
    if config.critic_trunk == "shared":
        forward, values_fn = shared_trunk(models.module)
        like = models.actor(actor)["final_norm"]["scale"]
        head = fresh_score(like, _head_key(config))
        critic_params = {"score": head.astype(jnp.float32)}
    else:
        path = config.critic or config.reward_model or config.policy
        check_language(language, "critic", path)
        network, critic_params = networks.trained(
            path,
            "value",
            # A reward model has a head; anything else may be a language model.
            key=None if path == config.reward_model else _head_key(config),
        )
        frozen = network.frozen
        modules = {"policy": models.module, "critic": network.module}
        check_networks(config, language, modules, prompt_width=prompt_width)
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

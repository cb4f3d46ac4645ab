"""The four models of PPO: actor and critic, reference and reward model."""

import dataclasses

from jax.sharding import Mesh

from rlhf_jax.algo.types import Params
from rlhf_jax.interfaces import ScoreFn, ValuesFn
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.callables import Policy, critic, policy, reward_model
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.configs import PPOConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, frozen_network, trained_network


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourModels:
    """How to call the four, and the parameters of the frozen two."""

    module: Transformer
    policy: Policy
    values_fn: ValuesFn
    score_fn: ScoreFn
    reference: Params
    reward: Params


def load_four_models(
    config: PPOConfig, language: Language, mesh: Mesh, *, prompt_width: int
) -> tuple[FourModels, ActorCritic]:
    """The models, and where actor and critic start; no two share an array."""
    critic_path = config.critic or config.reward_model
    reference_path = config.reference or config.policy
    for name, path in (
        ("reward-model", config.reward_model),
        ("critic", critic_path),
        ("reference", reference_path),
    ):
        language.check_same_as(Language.load(path), name, path)
    module, actor = trained_network(config.policy, config, head="lm", mesh=mesh)
    reference_module, reference = frozen_network(
        reference_path, config, head="lm", mesh=mesh
    )
    if reference_module.config != module.config:
        raise ValueError(
            f"reference={reference_path!r}: its shape differs from that of "
            f"policy={config.policy!r}; the two run through one program"
        )
    critic_module, critic_params = trained_network(
        critic_path, config, head="value", mesh=mesh
    )
    reward_module, reward = frozen_network(
        config.reward_model, config, head="reward", mesh=mesh
    )
    for name, network in (
        ("policy", module),
        ("critic", critic_module),
        ("reward-model", reward_module),
    ):
        if network.config.vocab_size < module.config.vocab_size:
            raise ValueError(
                f"{name}: embeddings for {network.config.vocab_size} tokens, but the "
                f"policy can draw any of {module.config.vocab_size}"
            )
        check_fits(
            network,
            language,
            needed=prompt_width + config.max_new_tokens,
            name=name,
            why=f"prompts of {prompt_width} + max-new-tokens={config.max_new_tokens}",
        )
    models = FourModels(
        module=module,
        policy=policy(module),
        values_fn=critic(critic_module),
        score_fn=reward_model(reward_module),
        reference=reference,
        reward=reward,
    )
    return models, ActorCritic(actor=actor, critic=critic_params)

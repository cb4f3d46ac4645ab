"""The policy, its frozen reference and the frozen reward models of a run."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.ensembles import combine_scores
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.interfaces import ScoreFn
from rlhf_jax.models.callables import Policy, policy, reward_model
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, frozen_network, trained_network
from rlhf_jax.recipes.policy_configs import GRPOConfig, PolicyConfig, PPOConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyModels:
    """How to call the models, and the parameters of the frozen ones."""

    module: Transformer
    policy: Policy
    score_fn: ScoreFn | None  # None: no reward model
    reference: Params | None
    reward: Params | None


def load_policy_models(
    config: PPOConfig | GRPOConfig,
    language: Language,
    mesh: Mesh,
    *,
    prompt_width: int,
) -> tuple[PolicyModels, Params]:
    """The models, and where the policy starts; no two share an array.

    Args:
        config: of the run.
        language: the policy's tokenizer, which must be that of all.
        mesh: where the parameters go.
        prompt_width: longest prompt, in tokens.

    Raises:
        ValueError: where the models do not fit each other or the data.
    """
    reference_path = config.reference or config.policy
    check_language(language, "reference", reference_path)
    module, actor = trained_network(config.policy, config, head="lm", mesh=mesh)
    networks = {"policy": module}
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
    score_fn = reward = None
    if config.reward_model is not None:
        paths = (config.reward_model, *config.ensemble)
        score_fn, reward, judges = _load_reward_models(paths, config, language, mesh)
        networks |= judges
    check_networks(config, language, networks, prompt_width=prompt_width)
    models = PolicyModels(
        module=module,
        policy=policy(module),
        score_fn=score_fn,
        reference=reference,
        reward=reward,
    )
    return models, actor


def check_language(language: Language, name: str, path: str) -> None:
    """Raises ValueError unless a model has the policy's tokenizer."""
    language.check_same_as(Language.load(path), name, path)


def check_networks(
    config: PolicyConfig,
    language: Language,
    networks: dict[str, Transformer],
    *,
    prompt_width: int,
) -> None:
    """Raises ValueError where a network cannot read what the policy can write.

    Args:
        config: of the run.
        language: the policy's tokenizer.
        networks: by the name of their option; `"policy"` is among them.
        prompt_width: longest prompt, in tokens.
    """
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


def _load_reward_models(
    paths: Sequence[str], config: PolicyConfig, language: Language, mesh: Mesh
) -> tuple[ScoreFn, Params, dict[str, Transformer]]:
    """One score of one or several models, their parameters, and their networks."""
    score_fns, params, networks = [], [], {}
    for number, path in enumerate(paths):
        name = "reward-model" if number == 0 else f"ensemble {path}"
        check_language(language, name, path)
        module, loaded = frozen_network(path, config, head="reward", mesh=mesh)
        score_fns.append(reward_model(module))
        params.append(loaded)
        networks[name] = module
    if len(paths) == 1:
        return score_fns[0], params[0], networks
    combine = partial(
        combine_scores, how=config.ensemble_score, penalty=config.ensemble_penalty
    )

    def score(params: Params, tokens: Array, mask: Array, /) -> Array:
        pairs = zip(score_fns, params, strict=True)
        return combine(jnp.stack([fn(own, tokens, mask) for fn, own in pairs]))

    return score, params, networks

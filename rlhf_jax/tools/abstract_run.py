"""Models, states and batches of a run as shapes with shardings, without numbers."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import RunConfig
from rlhf_jax.interfaces import BATCH_AXES
from rlhf_jax.learner.objectives import separate_networks
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.callables import critic, policy, reward_model
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.hf.tensor_layout import parameter_shapes
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.quantize import quantize_kernels
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.networks import Network, configured, lora_options
from rlhf_jax.recipes.policy_models import FourModels, PolicyModels


def place(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that a run gives to parameters and states."""
    return with_shardings(tree, parameter_sharding(mesh, tree))


def spread(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings of a batch."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return with_shardings(tree, jax.tree.map(lambda _: rows, tree))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes, placed."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        tree,
        shardings,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of placed shapes on one device; the same on all."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def tokens(*shape: int) -> Any:
    """Token ids."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def flags(*shape: int) -> Any:
    """A mask."""
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


class AbstractNetworks:
    """What `adapted.Networks` would read, as shapes.

    Args:
        config: of the run.
        shape: of every model.
        mesh: where the parameters would go.
    """

    def __init__(self, config: RunConfig, shape: DecoderConfig, mesh: Mesh):
        self._config = config
        self._shape = shape
        self._mesh = mesh

    def frozen(self, head: Head) -> tuple[Transformer, Params]:
        """A network that is only read."""
        config = self._config
        stored = config.lora.base_dtype or config.dtype
        if stored != "int8":
            return self._network(head, stored)
        module, params = self._network(head, config.dtype)
        return module, place(jax.eval_shape(quantize_kernels, params), self._mesh)

    def trained(self, head: Head) -> tuple[Network, Params]:
        """A network to go on training, or with adapters on it, and what is trained."""
        lora = self._config.lora
        if not lora.is_on:
            module, params = self._network(head, "float32")
            return Network(module=module), params
        module, params = self.frozen(head)
        options = lora_options(lora)
        init = partial(init_adapters, options=options)
        trained = jax.eval_shape(init, jax.random.key(0), params)
        frozen = {name: leaf for name, leaf in params.items() if name != "score"}
        network = Network(module=module, frozen=frozen, lora=options)
        return network, place(trained, self._mesh)

    def _network(self, head: Head, dtype: str) -> tuple[Transformer, Params]:
        module = Transformer(self._shape, head=head, param_dtype=jnp.dtype(dtype))
        params = unflatten_dict(parameter_shapes(module), sep="/")
        return configured(module, self._config), place(params, self._mesh)


def policy_models(
    config: PPOConfig | GRPOConfig, networks: AbstractNetworks
) -> tuple[PolicyModels, Params]:
    """As `policy_models.load_policy_models`, with one reward model."""
    network, actor = networks.trained("lm")
    reference = None
    if config.kl.place != "none":
        # With adapters the reference is the policy without them.
        reference = network.frozen if config.lora.is_on else networks.frozen("lm")[1]
    judge, reward = networks.frozen("reward")
    models = PolicyModels(
        module=network.module,
        policy=policy(network.module),
        score_fn=reward_model(judge),
        reference=reference,
        reward=reward,
        network=network,
        frozen=ActorCritic(actor=network.frozen, critic={}),
    )
    return models, actor


def four_models(
    config: PPOConfig, networks: AbstractNetworks
) -> tuple[FourModels, ActorCritic]:
    """As `four_models.load_four_models`; the critic starts as the reward model."""
    models, actor = policy_models(config, networks)
    network, critic_params = networks.trained("value")
    frozen: Params | None = network.frozen
    if frozen is not None:  # the critic stands on the reward model's arrays
        assert models.reward is not None
        frozen = {name: leaf for name, leaf in models.reward.items() if name != "score"}
    values_fn = critic(network.module)
    both = dataclasses.replace(models.frozen, critic=frozen)
    given: dict[str, Any] = vars(models) | {"frozen": both}
    four = FourModels(
        **given,
        forward=separate_networks(
            token_logprobs_fn=models.policy.token_logprobs, values_fn=values_fn
        ),
        values_fn=values_fn,
        shares_trunk=False,
    )
    return four, ActorCritic(actor=actor, critic=critic_params)


def cache_bytes(
    models: PolicyModels, actor: Params, prompts: Any, cache_length: int, mesh: Mesh
) -> int:
    """Bytes of keys and values on each device, whose rows are split like a batch."""

    def prefill(params: Params, ids: Array, mask: Array) -> Any:
        _, cache = models.policy.prefill(params, ids, mask, cache_length=cache_length)
        return cache.keys, cache.values

    shape = prompts.tokens.shape
    cache = jax.eval_shape(prefill, actor, tokens(*shape), flags(*shape))
    return bytes_per_device(spread(cache, mesh))

"""Networks of a run as what is trained of them and what is not.

Without adapters all of a network is trained, and frozen networks are others. With them
a network is a frozen one, which others may share, and a small tree beside it.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.learner.gradients import Assemble
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.config import Head
from rlhf_jax.models.heads import with_head
from rlhf_jax.models.hf_weights import save_pretrained
from rlhf_jax.models.lora import LoraOptions, attach, init_adapters, merge
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import frozen_network, trained_network
from rlhf_jax.runtime.config import RunConfig
from rlhf_jax.runtime.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network that is trained whole, or by adapters on what is frozen."""

    module: Transformer
    frozen: Params | None = None  # what adapters adapt; None: all is trained
    lora: LoraOptions | None = None  # of the adapters, if that is what is trained

    def whole(self, trained: Params) -> Params:
        """The parameters that the module reads; frozen arrays are shared."""
        return assembling(self.lora)(trained, self.frozen)


def assembling(lora: LoraOptions | None) -> Assemble:
    """`(trained, frozen, key=None) -> whole`, of one network or of actor and critic.

    What has no frozen part is whole. With a key, dropout is drawn.
    """

    def assemble(trained: Params, frozen: Params | None, key: Array | None = None):
        if lora is None or frozen is None:
            return trained
        if isinstance(trained, ActorCritic):
            return ActorCritic(
                actor=assemble(trained.actor, frozen.actor, key),
                critic=assemble(trained.critic, frozen.critic, key),
            )
        return attach(frozen, trained, lora, key=key)

    return assemble


class Networks:
    """Reads the networks of a run; adapters share what is frozen below them.

    With adapters each directory is read once: the reference is the policy without its
    adapters, a critic may stand on the reward model or on the policy.

    Args:
        config: of the run.
        mesh: where the parameters go.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        self._config = config
        self._mesh = mesh
        self._found: dict[Path, tuple[Transformer, Params]] = {}
        self._num_adapted = 0

    def frozen(
        self, path: str, head: Head, *, key: Array | None = None
    ) -> tuple[Transformer, Params]:
        """A network that is only read; `key` draws a score vector it does not have."""
        config, mesh = self._config, self._mesh
        if not config.lora.is_on:
            return frozen_network(path, config, head=head, mesh=mesh, key=key)
        place = Path(path).resolve()
        if place not in self._found:
            self._found[place] = frozen_network(
                path, config, head=head, mesh=mesh, key=key
            )
        return with_head(*self._found[place], head, key=key)

    def trained(
        self, path: str, head: Head, *, key: Array | None = None
    ) -> tuple[Network, Params]:
        """A network to go on training, or with adapters on it, and what is trained.

        Args:
            path: Hugging Face directory.
            head: the one that is trained.
            key: draws a score vector that the directory does not have.

        Raises:
            ValueError: the directory cannot be read, or adapters are wanted on layers
                that it does not have.
        """
        config = self._config
        if not config.lora.is_on:
            module, params = trained_network(
                path, config, head=head, mesh=self._mesh, key=key
            )
            return Network(module=module), params
        module, params = self.frozen(path, head, key=key)
        options = LoraOptions(
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=config.lora.targets,
            rslora=config.lora.rslora,
        )
        trained = init_adapters(self._adapter_key(), params, options)
        frozen = {name: leaf for name, leaf in params.items() if name != "score"}
        return Network(module=module, frozen=frozen, lora=options), trained

    def _adapter_key(self) -> Array:
        """Differs between networks; none that the run splits off its seed."""
        self._num_adapted += 1
        return jax.random.fold_in(
            jax.random.key(self._config.seed), 20 + self._num_adapted
        )


def save_trained(
    run: RunDirectory,
    network: Network,
    config: RunConfig,
    language: Language,
    mesh: Mesh,
    trained: Params,
) -> None:
    """Writes what was trained: the model, or adapters and the model with them in it."""
    save = partial(
        save_pretrained,
        run.model,
        network.module,
        tokenizer=language.tokenizer,
        generation_config=language.generation_config_to_save,
    )
    if network.lora is None:
        save(trained)
        return
    assert network.frozen is not None
    if config.lora.merge:
        save(merge(network.frozen, trained, network.lora))

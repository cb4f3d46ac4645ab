"""Builds or loads the networks of a run and shards them over its mesh."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.adapters import LoraConfig
from rlhf_jax.config.run import Dtype, FreshModelConfig, RunConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.files.atomic import errors_name
from rlhf_jax.learner.gradients import Assemble
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.config import DecoderConfig, Head, gpt2_config, llama_config
from rlhf_jax.models.heads import with_head
from rlhf_jax.models.hf.checkpoint import Checkpoint, load_model, open_checkpoint
from rlhf_jax.models.hf.hf_weights import save_pretrained
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.peft_config import read_peft_config
from rlhf_jax.models.hf.peft_files import read_adapter, write_adapter
from rlhf_jax.models.hf.tensor_layout import parameter_shapes
from rlhf_jax.models.lora import (
    LoraOptions,
    attach,
    init_adapters,
    merged_when_read,
    target_layers,
    trained_head,
)
from rlhf_jax.models.quantize import quantized_leaf
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network that is fully trained, or frozen with trainable adapters."""

    module: Transformer
    frozen: Params | None = None  # base of the adapters; None: fully trained
    lora: LoraOptions | None = None  # of the adapters, if any
    path: str = ""  # directory of the frozen parameters

    def whole(self, trained: Params) -> Params:
        """The module's parameters; frozen arrays are shared."""
        return assembling(self.lora)(trained, self.frozen)


def assembling(lora: LoraOptions | None) -> Assemble:
    """`(trained, frozen, key=None) -> whole`, for one network or actor and critic.

    Without a frozen part, `trained` is returned. With a key, dropout is applied.
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


def lora_options(config: LoraConfig) -> LoraOptions:
    """Options of new adapters, from a configuration."""
    return LoraOptions(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=config.targets,
        rslora=config.rslora,
    )


State = TypeVar("State")


class Networks:
    """Builds the networks of a run and shards their trainable parameters.

    With adapters, each directory is read once and frozen parameters are shared: the
    reference is the policy without its adapters; the base of the critic may be the
    reward model or the policy.

    A few short methods do everything that needs files or values;
    `tools.abstract_run.AbstractNetworks` overrides them to plan a run from shapes.

    Args:
        config: configuration of the run.
        mesh: device mesh of the parameters.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self._found: dict[Any, tuple[Transformer, Params]] = {}
        self._num_adapted = 0
        self._options: LoraOptions | None = None

    def make(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """The result of a function of arrays."""
        return function(*arrays)

    def place(self, state: State) -> tuple[State, State]:
        """A state on its mesh, and its shardings."""
        sharding = parameter_sharding(self.mesh, state)
        return jax.device_put(state, sharding), sharding

    def fresh(self, shape: DecoderConfig, key: Array) -> tuple[Network, Params]:
        """A language model to train from scratch."""
        module = Transformer(shape)
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = jax.jit(module.init)(key, tokens, tokens == 0)["params"]
        return Network(module=configured(module, self.config)), params

    def frozen(
        self, path: str, head: Head, *, key: Array | None = None
    ) -> tuple[Transformer, Params]:
        """A frozen network; `key` initializes a missing score head."""
        checkpoint = self._open(path)
        stored = self.config.lora.base_dtype or self.config.dtype
        load = partial(self._load, checkpoint, head, stored=stored, key=key)
        if not self.config.lora.is_on:
            return load()
        place = checkpoint.own_directory.resolve()
        if place not in self._found:
            self._found[place] = load()
        return self._with_head(*self._found[place], head, key=key)

    def trained(
        self, path: str, head: Head, *, key: Array | None = None
    ) -> tuple[Network, Params]:
        """A network to train, fully or with adapters, and its trainable parameters.

        Args:
            path: path for `open_checkpoint`.
            head: head to train.
            key: initializes a score head that the checkpoint lacks.

        Raises:
            ValueError: the checkpoint cannot be read, or has no layers that match
                lora.targets.
        """
        checkpoint = self._open(path)
        if not self.config.lora.is_on:
            module, params = self._load(checkpoint, head, stored="float32", key=key)
            return Network(module=module), params
        if head != "value" and checkpoint.adapter is not None:
            raise ValueError(
                f"{path} contains an adapter, and an adapter on an adapter cannot be "
                "saved; give its base model here and the adapter as lora.adapter, or "
                "merge the two first with rlhf-jax merge"
            )
        module, params = self.frozen(path, head, key=key)
        trained, options = self._adapters(path, module, params)
        frozen = {name: leaf for name, leaf in params.items() if name != "score"}
        network = Network(module=module, frozen=frozen, lora=options, path=path)
        return network, trained

    def _open(self, path: str) -> Checkpoint:
        return open_checkpoint(path)

    def _with_head(
        self, module: Transformer, params: Params, head: Head, *, key: Array | None
    ) -> tuple[Transformer, Params]:
        return with_head(module, params, head, key=key)

    def _load(
        self,
        checkpoint: Checkpoint,
        head: Head,
        *,
        stored: str,
        key: Array | None,
    ) -> tuple[Transformer, Params]:
        """Reads weights; if kernels are int8, the rest has the run's dtype."""
        module, params = load_model(
            checkpoint,
            head=head,
            dtype=jnp.dtype(self.config.dtype if stored == "int8" else stored),
            mesh=self.mesh,
            key=key,
            convert=quantized_leaf if stored == "int8" else None,
        )
        return configured(module, self.config), params

    def _adapters(
        self, path: str, module: Transformer, params: Params
    ) -> tuple[Params, LoraOptions]:
        """Adapters from `lora.adapter` for the first network, new ones for others."""
        lora = self.config.lora
        self._num_adapted += 1
        if self._options is None and lora.adapter is not None:
            return self._read_adapters(lora.adapter, path, module, params)
        if self._options is None:
            self._options = lora_options(lora)
        # Different from the keys that the run derives from its seed.
        key = jax.random.fold_in(seed_key(self.config.seed), 20 + self._num_adapted)
        options = self._options
        init = partial(init_adapters, options=options)
        return self.make(init, key, params), options

    def _read_adapters(
        self, adapter: str, path: str, module: Transformer, params: Params
    ) -> tuple[Params, LoraOptions]:
        """Adapters trained by another run, to continue training."""
        directory = local_directory(adapter)  # its base is not needed
        named = read_peft_config(directory).base
        if named and named != path and Path(named).resolve() != Path(path).resolve():
            heading(
                f"{directory} was trained on {named}; continuing on {path}",
                quiet=self.config.quiet,
            )
        dropout = self.config.lora.dropout
        trained, self._options = read_adapter(directory, module, dropout=dropout)
        if module.head == "lm" and "score" in trained:
            raise ValueError(
                f"lora.adapter={adapter!r}: adapts a sequence classifier; "
                "this stage trains a language model"
            )
        return trained_head(params) | trained, self._options


def fresh_shape(config: FreshModelConfig, *, vocab_size: int) -> DecoderConfig:
    """Shape of a model that is trained from scratch."""
    family = {"gpt2": gpt2_config, "llama": llama_config}[config.family]
    return family(
        vocab_size=vocab_size,
        max_positions=config.max_positions,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )


def read_network(path: str, *, head: Head, dtype: Dtype) -> tuple[Transformer, Params]:
    """A checkpoint with parameters and activations in one dtype."""
    module, params = load_model(path, head=head, dtype=jnp.dtype(dtype))
    return module.clone(dtype=jnp.dtype(dtype)), params


def configured(module: Transformer, config: RunConfig) -> Transformer:
    """The module with the run's dtype, remat and layer scan."""
    return module.clone(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan_layers=config.scan_layers,
    )


def check_adapters(config: RunConfig, shape: DecoderConfig) -> None:
    """Raises ValueError if adapters cannot be read, or name layers that are not there.

    Reads no weights.
    """
    if config.lora.adapter is not None:
        read_peft_config(local_directory(config.lora.adapter))
    elif config.lora.is_on:
        shapes = unflatten_dict(parameter_shapes(Transformer(shape)), sep="/")
        target_layers(shapes, config.lora.targets)


def check_fits(
    shape: DecoderConfig,
    tokenization: Tokenization,
    *,
    needed: int,
    name: str,
    why: str,
) -> None:
    """Raises ValueError if token ids or sequence lengths exceed the model's tables.

    Compiled programs do not check indices: beyond the end they read the last row.

    Args:
        shape: shape of the model.
        tokenization: its tokenizer.
        needed: maximum sequence length.
        name: the model's name in the message.
        why: the source of the length.
    """
    vocabulary, limit = shape.vocab_size, shape.max_positions
    tokens = tokenization.num_ordinary_tokens()
    if tokens > vocabulary:
        raise ValueError(
            f"{name}: its tokenizer has {tokens} tokens, but the model has embeddings "
            f"for {vocabulary}; use the tokenizer it was trained with"
        )
    if needed > limit:
        raise ValueError(
            f"{why}: {needed} tokens, but {name} supports at most {limit} (its "
            "max_positions); lower the limits or use a model with more positions"
        )


def save_trained(
    run: RunDirectory,
    network: Network,
    config: RunConfig,
    tokenization: Tokenization,
    trained: Params,
) -> None:
    """Saves the trained model, or the adapters and the merged model.

    Adapters are merged into the base weights as in its file, whatever the run stored,
    layer by layer during writing.
    """
    save = partial(
        errors_name(run.model)(save_pretrained),
        run.model,
        network.module,
        tokenizer=tokenization.tokenizer,
        generation_config=tokenization.generation_config_to_save,
    )
    if network.lora is None:
        save(trained)
        return
    write_adapter(
        run.adapter,
        network.module,
        trained,
        network.lora,
        base=network.path,
        tokenizer=tokenization.tokenizer,
    )
    if not config.lora.merge:  # an older merged model of the run is outdated
        shutil.rmtree(run.model, ignore_errors=True)
        return
    base, adapters = network.frozen, trained
    assert base is not None
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(base)):
        # On the host: devices may lack memory for another copy of the base.
        adapters = jax.device_get(trained)
        with jax.default_device(jax.devices("cpu")[0]):
            _, base = load_model(
                network.path,
                head=network.module.head,
                key=jax.random.key(0),  # the adapters include the score head
            )
    save(merged_when_read(base, adapters, network.lora))

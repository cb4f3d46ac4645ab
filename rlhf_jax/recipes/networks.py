"""Networks and training states of a run, built or loaded, and placed on its mesh."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.run import Dtype, FreshModelConfig, LoraConfig, RunConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.gradients import Assemble
from rlhf_jax.learner.train_state import ActorCritic
from rlhf_jax.models.config import DecoderConfig, Head, gpt2_config, llama_config
from rlhf_jax.models.heads import with_head
from rlhf_jax.models.hf.hf_weights import save_pretrained
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.peft_config import is_adapter, read_peft_config
from rlhf_jax.models.hf.peft_files import read_adapter, write_adapter
from rlhf_jax.models.hf.peft_loading import load_model
from rlhf_jax.models.lora import (
    LoraOptions,
    attach,
    init_adapters,
    merged_when_read,
    trained_head,
)
from rlhf_jax.models.quantize import quantized_leaf
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network that is trained whole, or by adapters on what is frozen."""

    module: Transformer
    frozen: Params | None = None  # what adapters adapt; None: all is trained
    lora: LoraOptions | None = None  # of the adapters, if that is what is trained
    path: str = ""  # of the directory of what is frozen

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


def lora_options(config: LoraConfig) -> LoraOptions:
    """Fresh adapters as a configuration describes them."""
    return LoraOptions(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=config.targets,
        rslora=config.rslora,
    )


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
        self._options: LoraOptions | None = None

    def frozen(
        self, path: str, head: Head, *, key: Array | None = None
    ) -> tuple[Transformer, Params]:
        """A network that is only read; `key` draws a score vector it does not have."""
        config, mesh = self._config, self._mesh
        if not config.lora.is_on:
            return frozen_network(path, config, head=head, mesh=mesh, key=key)
        place = local_directory(path).resolve()
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
        if head != "value" and is_adapter(local_directory(path)):
            raise ValueError(
                f"{path} holds an adapter, and an adapter of an adapter cannot be "
                "written; give its base model here and the adapter as lora.adapter, or "
                "merge the two first with rlhf-jax merge"
            )
        module, params = self.frozen(path, head, key=key)
        trained, options = self._adapters(path, module, params)
        frozen = {name: leaf for name, leaf in params.items() if name != "score"}
        network = Network(module=module, frozen=frozen, lora=options, path=path)
        return network, trained

    def _say_if_moved(self, adapter: Path, path: str) -> None:
        """Says where an adapter that goes on is put on another model than its own."""
        named = read_peft_config(adapter).base
        if named and named != path and Path(named).resolve() != Path(path).resolve():
            heading(
                f"{adapter} was trained on {named}, and goes on here on {path}",
                quiet=self._config.quiet,
            )

    def _adapters(
        self, path: str, module: Transformer, params: Params
    ) -> tuple[Params, LoraOptions]:
        """Those to go on training, of the first network; fresh ones of any other."""
        lora = self._config.lora
        self._num_adapted += 1
        if self._options is None and lora.adapter is not None:
            directory = local_directory(lora.adapter)
            self._say_if_moved(directory, path)
            trained, self._options = read_adapter(
                directory, module, dropout=lora.dropout
            )
            if module.head == "lm" and "score" in trained:
                raise ValueError(
                    f"lora.adapter={lora.adapter!r}: adapts a sequence classifier; "
                    "this stage trains a language model"
                )
            return trained_head(params) | trained, self._options
        if self._options is None:
            self._options = lora_options(lora)
        # None of the keys that the run splits off its seed.
        key = jax.random.fold_in(
            jax.random.key(self._config.seed), 20 + self._num_adapted
        )
        return init_adapters(key, params, self._options), self._options


State = TypeVar("State")


def fresh_network(
    config: FreshModelConfig, *, vocab_size: int, key: Array
) -> tuple[Transformer, Params]:
    """A language model of the given shape with random weights."""
    family = {"gpt2": gpt2_config, "llama": llama_config}[config.family]
    shape: DecoderConfig = family(
        vocab_size=vocab_size,
        max_positions=config.max_positions,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )
    module = Transformer(shape)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(module.init)(key, tokens, tokens == 0)["params"]
    return module, params


def trained_network(
    path: str, config: RunConfig, *, head: Head, mesh: Mesh, key: Array | None = None
) -> tuple[Transformer, Params]:
    """A checkpoint to go on training: float32 parameters, activations as configured."""
    module, params = load_model(path, head=head, mesh=mesh, key=key)
    return configured(module, config), params


def frozen_network(
    path: str, config: RunConfig, *, head: Head, mesh: Mesh, key: Array | None = None
) -> tuple[Transformer, Params]:
    """A checkpoint that is only read: parameters and activations as configured."""
    stored = config.lora.base_dtype or config.dtype
    dtype = config.dtype if stored == "int8" else stored
    module, params = load_model(
        path,
        head=head,
        dtype=jnp.dtype(dtype),
        mesh=mesh,
        key=key,
        convert=quantized_leaf if stored == "int8" else None,
    )
    return configured(module, config), params


def read_network(
    path: str, *, head: Head, dtype: Dtype, mesh: Mesh | None = None
) -> tuple[Transformer, Params]:
    """A checkpoint with parameters and activations of one dtype."""
    module, params = load_model(path, head=head, mesh=mesh, dtype=jnp.dtype(dtype))
    return module.clone(dtype=jnp.dtype(dtype)), params


def configured(module: Transformer, config: RunConfig) -> Transformer:
    """The module with the run's dtype, rematerialisation and layer loop."""
    return module.clone(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan_layers=config.scan_layers,
    )


def place_state(state: State, mesh: Mesh) -> tuple[State, State]:
    """A state on its mesh, and the shardings that keep it there."""
    sharding = parameter_sharding(mesh, state)
    return jax.device_put(state, sharding), sharding


def check_fits(
    module: Transformer, tokenization: Tokenization, *, needed: int, name: str, why: str
) -> None:
    """Raises ValueError where a model cannot read the tokens it will be given.

    Indexing past the end of a table is no error inside a compiled program: it reads
    the last row.

    Args:
        module: the model.
        tokenization: its tokenizer.
        needed: length of the longest sequence.
        name: what the model is called in the message.
        why: where the length comes from.
    """
    vocabulary, limit = module.config.vocab_size, module.config.max_positions
    tokens = tokenization.num_ordinary_tokens()
    if tokens > vocabulary:
        raise ValueError(
            f"{name}: its tokenizer has {tokens} tokens, but the model has embeddings "
            f"for {vocabulary}; take the tokenizer it was trained with"
        )
    if needed > limit:
        raise ValueError(
            f"{why}: {needed} tokens, but {name} reads at most {limit} (its "
            "max_positions); lower the limits or take a model with more positions"
        )


def save_trained(
    run: RunDirectory,
    network: Network,
    config: RunConfig,
    tokenization: Tokenization,
    trained: Params,
) -> None:
    """Writes what was trained: the model, or adapters and the model with them in it.

    They are merged into the base as its file has it, whatever the run stored it as,
    layer by layer while it is written.
    """
    save = partial(
        save_pretrained,
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
    if not config.lora.merge:  # an older model of the run has other adapters in it
        shutil.rmtree(run.model, ignore_errors=True)
        return
    base, adapters = network.frozen, trained
    assert base is not None
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(base)):
        # On the host: beside the run its devices may have no room for another base.
        adapters = jax.device_get(trained)
        with jax.default_device(jax.devices("cpu")[0]):
            _, base = load_model(
                network.path,
                head=network.module.head,
                key=jax.random.key(0),  # the adapters bring the score vector
            )
    save(merged_when_read(base, adapters, network.lora))

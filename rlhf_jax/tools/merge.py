"""An adapter and its base model as one Hugging Face directory."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.config.tools import MergeConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.hf.hf_weights import save_pretrained
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.peft_config import CONFIG, is_adapter, read_peft_config
from rlhf_jax.models.hf.peft_loading import load_model
from rlhf_jax.run.progress import heading


def run(config: MergeConfig) -> None:
    """Writes the model.

    Raises:
        ValueError: where the two do not fit each other, or cannot be read.
    """
    directory = local_directory(config.adapter)
    if not is_adapter(directory):
        raise ValueError(
            f"adapter={config.adapter!r}: no directory of an adapter; it has no "
            f"{CONFIG}, or a whole model beside it"
        )
    base = None if config.model is None else local_directory(config.model)
    tokenization = Tokenization.load(directory, base=base)
    is_classifier = read_peft_config(directory).is_classifier
    module, params = load_model(
        directory, head="reward" if is_classifier else "lm", base=base
    )
    dtype = jnp.dtype(config.dtype)
    save_pretrained(
        Path(config.output),
        module,
        jax.tree.map(lambda x: x.astype(dtype), params),
        tokenizer=tokenization.tokenizer,
        generation_config=tokenization.generation_config_to_save,
    )
    heading(f"{config.output}: the model with {config.adapter} in it")

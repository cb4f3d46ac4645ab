"""An adapter and its base model as one Hugging Face directory."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.models.hf_weights import save_pretrained
from rlhf_jax.models.hub import local_directory
from rlhf_jax.models.peft_config import CONFIG, is_adapter, read_peft_config
from rlhf_jax.models.peft_loading import load_model
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.tool_configs import MergeConfig
from rlhf_jax.runtime.progress import heading


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
    language = Language.load(directory, base=base)
    is_classifier = read_peft_config(directory).is_classifier
    module, params = load_model(
        directory, head="reward" if is_classifier else "lm", base=base
    )
    dtype = jnp.dtype(config.dtype)
    save_pretrained(
        Path(config.output),
        module,
        jax.tree.map(lambda x: x.astype(dtype), params),
        tokenizer=language.tokenizer,
        generation_config=language.generation_config_to_save,
    )
    heading(f"{config.output}: the model with {config.adapter} in it")

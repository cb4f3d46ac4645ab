"""Merges an adapter and its base model into one Hugging Face directory."""

from pathlib import Path

import jax
import jax.numpy as jnp

from rlhf_jax.config.tools import MergeConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.hf.checkpoint import load_model, open_checkpoint
from rlhf_jax.models.hf.hf_weights import save_pretrained
from rlhf_jax.models.hf.peft_config import CONFIG, read_peft_config
from rlhf_jax.run.progress import heading


def run(config: MergeConfig) -> None:
    """Writes the model.

    Raises:
        ValueError: the two do not match, or cannot be read.
    """
    checkpoint = open_checkpoint(config.adapter, base=config.model)
    if checkpoint.adapter is None:
        raise ValueError(
            f"adapter={config.adapter!r}: not an adapter directory; it has no "
            f"{CONFIG}, or also contains a full model"
        )
    tokenization = Tokenization.load(checkpoint)
    is_classifier = read_peft_config(checkpoint.adapter).is_classifier
    module, params = load_model(checkpoint, head="reward" if is_classifier else "lm")
    dtype = jnp.dtype(config.dtype)
    save_pretrained(
        Path(config.output),
        module,
        jax.tree.map(lambda x: x.astype(dtype), params),
        tokenizer=tokenization.tokenizer,
        generation_config=tokenization.generation_config_to_save,
    )
    heading(f"{config.output}: the model merged with {config.adapter}")

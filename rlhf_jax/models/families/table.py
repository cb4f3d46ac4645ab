"""The table of families, and lookup by checkpoint or configuration."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.printable import shown
from rlhf_jax.files.regular_file import model_file
from rlhf_jax.files.typed_fields import Fields
from rlhf_jax.models.config import DecoderConfig, Head
from rlhf_jax.models.families.family import Family
from rlhf_jax.models.families.fields import expect
from rlhf_jax.models.families.gemma import GEMMA2, GEMMA3
from rlhf_jax.models.families.gpt2 import GPT2
from rlhf_jax.models.families.gpt_neox import GPT_NEOX
from rlhf_jax.models.families.llama import LLAMA, MISTRAL
from rlhf_jax.models.families.olmo2 import OLMO2
from rlhf_jax.models.families.opt import OPT
from rlhf_jax.models.families.phi3 import PHI3
from rlhf_jax.models.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(GPT2, GPT_NEOX, OPT, LLAMA, MISTRAL, QWEN2),
        *(QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2),
    )
}


def read_config(path: Path) -> tuple[Family, DecoderConfig]:
    """Loads a `config.json` of transformers 4 or 5.

    Args:
        path: directory of a checkpoint.

    Raises:
        ValueError: if there is no such file, or the family or a field is not supported.
    """
    file = path / "config.json"
    if not file.exists():
        raise ValueError(
            f"{file} does not exist; pass a local directory with a Hugging Face "
            "checkpoint (`hf download NAME --local-dir DIRECTORY` makes one)"
        )
    fields = read_object(model_file(path, file.name))
    model_type = fields.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(
            f"{path} has a model of model_type={shown(model_type)}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    try:
        expect(fields, "quantization_config", None)
        config = family.read(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return family.of(config), config


def family_of(config: DecoderConfig) -> Family:
    """The family of a configuration.

    Raises:
        ValueError: if there is no such family, or its `config.json` cannot represent
            the configuration.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise ValueError(
            f"family={config.family!r} of the configuration cannot be saved; "
            f"supported: {', '.join(FAMILIES)}"
        )
    again = family.read(
        family.write(config)
        | {"tie_word_embeddings": config.tie_embeddings}
        | {"initializer_range": config.initializer_range}
    )
    for name, value in vars(config).items():
        if vars(again)[name] != value:
            raise ValueError(
                f"{name}={value!r} cannot be saved: in a {config.family} checkpoint "
                f"it would be loaded as {vars(again)[name]!r}"
            )
    return family.of(config)


def config_fields(config: DecoderConfig, head: Head, dtype: Any) -> Fields:
    """`config.json` of a checkpoint, except its token ids.

    Args:
        config: the architecture.
        head: `"value"` and `"reward"` are sequence classifiers with one label.
        dtype: dtype of the stored tensors.

    Returns:
        Fields of transformers 5, and their older names as well.

    Raises:
        ValueError: if the configuration fits no family.
    """
    family = family_of(config)
    fields = {
        "model_type": family.model_type,
        "architectures": [family.lm_class if head == "lm" else family.score_class],
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": jnp.dtype(dtype).name,
        "torch_dtype": jnp.dtype(dtype).name,
        **family.write(config),
    }
    if head != "lm":  # the number of labels is counted
        fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return fields

"""The GPT-2 and Llama families of Hugging Face checkpoints: names of their tensors."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from rlhf_jax.models.config import DecoderConfig, Head, gpt2_config
from rlhf_jax.models.hf_config import (
    Fields,
    read_gpt2,
    read_llama,
    write_gpt2,
    write_llama,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRule:
    """How one stored tensor is made from leaves of the parameter tree.

    Attributes:
        name: name of the stored tensor; `{layer}` stands for the layer's index.
        leaves: paths of the leaves, joined on their last axis. A rule whose leaves are
            not in the model (biases, another head) does not apply to it.
        layout: `"same"`; `"transposed"` (`torch.nn.Linear` stores `[out, in]`, ours is
            `[in, out]`); or `"row"` (stored `[1, D]`, ours is `[D]`).
        block: size of the blocks in which the leaves alternate on the joined axis
            (GPT-NeoX stores head 0's query, key and value, then head 1's); None: one
            leaf after the other.
    """

    name: str
    leaves: tuple[str, ...]
    layout: Literal["same", "transposed", "row"] = "same"
    block: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of checkpoints calls its parts.

    Attributes:
        model_type: the field of `config.json` that names the family.
        lm_class: architecture of a language model.
        score_class: architecture of a reward model or critic.
        prefix: stands before the names of all tensors but the heads'. Files of a bare
            trunk leave it out.
        trunk: every tensor a trunk may have, of a model of that configuration; the
            token embedding comes first.
        lm_head: the output matrix, where it is not the token embedding.
        buffers: names of stored tensors that are constants, not parameters.
        read: fields of `config.json` → our configuration.
        write: our configuration → fields of `config.json`.
    """

    model_type: str
    lm_class: str
    score_class: str
    prefix: str
    trunk: tuple[TensorRule, ...]
    buffers: re.Pattern[str]
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], Fields]


LM_HEAD = TensorRule(
    name="lm_head.weight", leaves=("output_embedding",), layout="transposed"
)
SCORE = TensorRule(name="score.weight", leaves=("score",), layout="row")


def _conv1d(name: str, *leaves: str) -> tuple[TensorRule, TensorRule]:
    """GPT-2's `Conv1D` of every layer: stored `[in, out]`, like ours."""
    return (
        TensorRule(
            name=f"h.{{layer}}.{name}.weight",
            leaves=tuple(f"layers/{leaf}/kernel" for leaf in leaves),
        ),
        TensorRule(
            name=f"h.{{layer}}.{name}.bias",
            leaves=tuple(f"layers/{leaf}/bias" for leaf in leaves),
        ),
    )


def _linear(name: str, leaf: str) -> tuple[TensorRule, TensorRule]:
    """`torch.nn.Linear` of every layer: stored `[out, in]`."""
    return (
        TensorRule(
            name=f"layers.{{layer}}.{name}.weight",
            leaves=(f"layers/{leaf}/kernel",),
            layout="transposed",
        ),
        TensorRule(
            name=f"layers.{{layer}}.{name}.bias", leaves=(f"layers/{leaf}/bias",)
        ),
    )


def _norm(name: str, leaf: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(name=f"{name}.weight", leaves=(f"{leaf}/scale",)),
        TensorRule(name=f"{name}.bias", leaves=(f"{leaf}/bias",)),
    )


GPT2 = Family(
    model_type="gpt2",
    lm_class="GPT2LMHeadModel",
    score_class="GPT2ForSequenceClassification",
    prefix="transformer.",
    trunk=(
        TensorRule(name="wte.weight", leaves=("token_embedding",)),
        TensorRule(name="wpe.weight", leaves=("position_embedding",)),
        *_norm("h.{layer}.ln_1", "layers/attention_norm"),
        *_conv1d("attn.c_attn", "query", "key", "value"),
        *_conv1d("attn.c_proj", "output"),
        *_norm("h.{layer}.ln_2", "layers/mlp_norm"),
        *_conv1d("mlp.c_fc", "up"),
        *_conv1d("mlp.c_proj", "down"),
        *_norm("ln_f", "final_norm"),
    ),
    buffers=re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"),  # causal mask
    read=read_gpt2,
    write=write_gpt2,
)

LLAMA = Family(
    model_type="llama",
    lm_class="LlamaForCausalLM",
    score_class="LlamaForSequenceClassification",
    prefix="model.",
    trunk=(
        TensorRule(name="embed_tokens.weight", leaves=("token_embedding",)),
        *_norm("layers.{layer}.input_layernorm", "layers/attention_norm"),
        *_linear("self_attn.q_proj", "query"),
        *_linear("self_attn.k_proj", "key"),
        *_linear("self_attn.v_proj", "value"),
        *_linear("self_attn.o_proj", "output"),
        *_norm("layers.{layer}.post_attention_layernorm", "layers/mlp_norm"),
        *_linear("mlp.gate_proj", "gate"),
        *_linear("mlp.up_proj", "up"),
        *_linear("mlp.down_proj", "down"),
        *_norm("norm", "final_norm"),
    ),
    buffers=re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    read=read_llama,
    write=write_llama,
)


def read_config(path: Path) -> tuple[Family, DecoderConfig]:
    """Reads `config.json` as transformers 4 and 5 write it.

    Args:
        path: directory of a checkpoint.

    Raises:
        ValueError: no such file, a family that is not supported, or a field with a
            value that is not.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist; pass a local directory with a Hugging Face "
            "checkpoint (`hf download NAME --local-dir DIRECTORY` makes one)"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    families = {family.model_type: family for family in (GPT2, LLAMA)}
    family = families.get(fields.get("model_type"))
    if family is None:
        raise ValueError(
            f"{path} holds a model of model_type={fields.get('model_type')!r}; "
            f"supported: {' or '.join(map(repr, families))}"
        )
    try:
        return family, family.read(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def family_of(config: DecoderConfig) -> Family:
    """The family whose `config.json` can express this configuration.

    Raises:
        ValueError: neither family's can.
    """
    if config.positions == "learned":
        free = ("mlp_width", "tie_embeddings", "norm_eps", "initializer_range")
        gpt2 = gpt2_config(
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
        )
        given = dataclasses.asdict(config)
        if dataclasses.replace(gpt2, **{name: given[name] for name in free}) == config:
            return GPT2
    elif (
        (config.norm, config.mlp) == ("rms", "swiglu")
        and config.attention_bias == config.projection_bias
        and config.width % config.num_heads == 0
    ):
        return LLAMA
    raise ValueError(
        f"{config} fits no family that can be saved: GPT-2 has learned positions, "
        "LayerNorm, GELU, biases and equal heads of width / num_heads; Llama has "
        "rotary positions, RMSNorm, SwiGLU, biases everywhere or nowhere, and a width "
        "divisible by num_heads"
    )


def config_fields(config: DecoderConfig, head: Head, dtype: Any) -> Fields:
    """`config.json` of a checkpoint, all but its token ids.

    Args:
        config: the shape.
        head: `"value"` and `"reward"` are sequence classifiers with one label.
        dtype: dtype of the stored tensors.

    Returns:
        Fields that transformers 5 reads, and their older names beside them.

    Raises:
        ValueError: the configuration fits no family.
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
    if head != "lm":  # readers count the labels
        fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return fields

"""A family of Hugging Face checkpoints, as a table of differences."""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

from rlhf_jax.files.typed_fields import Fields
from rlhf_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRule:
    """How a stored tensor is built from leaves of the parameter tree.

    Attributes:
        name: name of the stored tensor; `{layer}` is the layer index.
        leaves: paths of the leaves, concatenated on their last axis. A rule whose
            leaves are not in the model (biases, another head) does not apply.
        layout: `"same"`; `"transposed"` (`torch.nn.Linear` stores `[out, in]`, ours is
            `[in, out]`); or `"row"` (stored `[1, D]`, ours is `[D]`).
        block: size of the blocks in which the leaves are interleaved on the
            concatenated axis (GPT-NeoX stores head 0's query, key and value, then head
            1's), or `"head"`, which `Family.of` replaces by the head size; None: one
            leaf after the other.
    """

    name: str
    leaves: tuple[str, ...]
    layout: Literal["same", "transposed", "row"] = "same"
    block: int | Literal["head"] | None = None


LM_HEAD = TensorRule(
    name="lm_head.weight", leaves=("output_embedding",), layout="transposed"
)
SCORE = TensorRule(name="score.weight", leaves=("score",), layout="row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The names and mappings of a family of checkpoints.

    Attributes:
        model_type: the field of `config.json` that names the family.
        lm_class: architecture of a language model.
        score_class: architecture of a reward model or critic.
        prefix: prefix of the names of all tensors except the heads'. Missing in files
            of a bare trunk.
        trunk: every tensor that a trunk can have; the token embedding comes first.
        lm_head: the output matrix, if not tied.
        buffers: names of stored tensors that are constants, not parameters.
        read: fields of `config.json` → our configuration.
        write: our configuration → fields of `config.json`.
    """

    model_type: str
    lm_class: str
    score_class: str
    prefix: str
    trunk: tuple[TensorRule, ...]
    lm_head: TensorRule = LM_HEAD
    buffers: re.Pattern[str]
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], Fields]

    def of(self, config: DecoderConfig) -> "Family":
        """The family with the sizes of one model in its rules."""
        trunk = tuple(
            dataclasses.replace(rule, block=config.head_dim)
            if rule.block == "head"
            else rule
            for rule in self.trunk
        )
        return dataclasses.replace(self, trunk=trunk)


ROTARY_BUFFERS = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def linear(name: str, *leaves: str) -> tuple[TensorRule, TensorRule]:
    """`torch.nn.Linear` of every layer: stored `[out, in]`.

    Args:
        name: of the module, with `{layer}`.
        leaves: its parts in our tree, concatenated.
    """
    return (
        TensorRule(
            name=f"{name}.weight",
            leaves=tuple(f"layers/{leaf}/kernel" for leaf in leaves),
            layout="transposed",
        ),
        TensorRule(
            name=f"{name}.bias", leaves=tuple(f"layers/{leaf}/bias" for leaf in leaves)
        ),
    )


def norm(name: str, leaf: str) -> tuple[TensorRule, TensorRule]:
    """A norm, with or without a bias."""
    return (
        TensorRule(name=f"{name}.weight", leaves=(f"{leaf}/scale",)),
        TensorRule(name=f"{name}.bias", leaves=(f"{leaf}/bias",)),
    )


PRE_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}
QUERY_KEY_NORMS = {"self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm"}


def llama_family(
    model_type: str,
    lm_class: str,
    *,
    read: Callable[[Fields], DecoderConfig],
    write: Callable[[DecoderConfig], Fields],
    score_class: str | None = None,
    norms: dict[str, str] = PRE_NORMS,
) -> Family:
    """A family with Llama's tensor names.

    Args:
        model_type: see `Family`.
        lm_class: see `Family`.
        read: see `Family`.
        write: see `Family`.
        score_class: if not named like the language model.
        norms: of a layer: name in the file → our leaf.
    """
    layer = "layers.{layer}"
    trunk = [TensorRule(name="embed_tokens.weight", leaves=("token_embedding",))]
    for name, leaf in norms.items():
        trunk += norm(f"{layer}.{name}", f"layers/{leaf}")
    for leaf in ("query", "key", "value", "output"):
        trunk += linear(f"{layer}.self_attn.{leaf[0]}_proj", leaf)
    for leaf in ("gate", "up", "down"):
        trunk += linear(f"{layer}.mlp.{leaf}_proj", leaf)
    classifier = lm_class.replace("ForCausalLM", "ForSequenceClassification")
    return Family(
        model_type=model_type,
        lm_class=lm_class,
        score_class=score_class or classifier,
        prefix="model.",
        trunk=(*trunk, *norm("norm", "final_norm")),
        buffers=ROTARY_BUFFERS,
        read=read,
        write=write,
    )

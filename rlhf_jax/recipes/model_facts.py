"""What a model directory says of itself, read from its configuration and headers."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families import SCORE, Family, read_config
from rlhf_jax.models.hub import local_directory
from rlhf_jax.models.peft_config import is_adapter
from rlhf_jax.models.peft_loading import base_of
from rlhf_jax.models.safetensors_files import open_tensors
from rlhf_jax.models.tensor_layout import parameter_shapes
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.language import Language

EXAMPLE = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model as its files describe it.

    Attributes:
        directory: where they are.
        adapter: a directory of adapters on that model, if that is what was named.
        config: the shape.
        head: `"lm"`, or `"reward"` for a sequence classifier.
        num_parameters: of trunk and head.
        stored: parameters in the files by dtype, in safetensors' words; empty where
            there are no weights.
        num_files: safetensors files.
        language: the tokenizer, or None.
        missing: why there is no weight or no tokenizer, a line each.
    """

    directory: Path
    adapter: Path | None
    config: DecoderConfig
    head: str
    num_parameters: int
    stored: dict[str, int]
    num_files: int
    language: Language | None
    missing: tuple[str, ...]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return () if self.language is None else self.language.stop_ids(())

    @property
    def pad_id(self) -> int:
        """Fills up rows; 0 where there is no tokenizer."""
        return 0 if self.language is None else self.language.pad_id

    @property
    def special_tokens(self) -> dict[str, tuple[str, int]]:
        """Name → text and id, of the special tokens that there are."""
        if self.language is None:
            return {}
        tokenizer = self.language.tokenizer
        names = ("bos", "eos", "pad", "unk")
        found = {}
        for name in names:
            text = getattr(tokenizer, f"{name}_token")
            if text is not None:
                found[name] = (str(text), int(getattr(tokenizer, f"{name}_token_id")))
        return found

    @property
    def rendered(self) -> str | None:
        """A short conversation by the chat template, or None without one."""
        if self.language is None or self.language.tokenizer.chat_template is None:
            return None
        return self.language.render(EXAMPLE, add_generation_prompt=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "directory": str(self.directory),
            "adapter": None if self.adapter is None else str(self.adapter),
            "family": self.config.family,
            "head": self.head,
            "layers": self.config.num_layers,
            "width": self.config.width,
            "heads": self.config.num_heads,
            "kv_heads": self.config.num_kv_heads,
            "head_dim": self.config.head_dim,
            "mlp_width": self.config.mlp_width,
            "vocabulary": self.config.vocab_size,
            "context": self.config.max_positions,
            "sliding_window": self.config.sliding_window,
            "tied": self.config.tie_embeddings,
            "parameters": self.num_parameters,
            "stored": self.stored,
            "files": self.num_files,
            "special_tokens": {
                name: {"text": text, "id": number}
                for name, (text, number) in self.special_tokens.items()
            },
            "stop_ids": list(self.stop_ids),
            "chat_template": self.rendered is not None,
            "rendered": self.rendered,
            "missing": list(self.missing),
        }


def read_facts(path: str) -> ModelFacts:
    """Reads configuration, headers and tokenizer; weights or tokenizer may be missing.

    Args:
        path: directory, or name on the Hub.

    Raises:
        ValueError: there is no `config.json` of a supported family.
    """
    directory, adapter = local_directory(path, weights=False), None
    if is_adapter(directory):
        adapter = directory
        directory = base_of(adapter)
    family, config = read_config(directory)
    missing = []
    stored: Counter[str] = Counter()
    files, head = 0, "lm"
    try:
        stored, files, head = _read_headers(directory, family, config)
    except ValueError as error:
        missing.append(f"weights: {error}")
    language = None
    try:
        language = Language.load(directory)
    except ValueError as error:
        missing.append(f"tokenizer: {error}")
    module = Transformer(config, head="reward" if head == "reward" else "lm")
    shapes = parameter_shapes(module)
    return ModelFacts(
        directory=directory,
        adapter=adapter,
        config=config,
        head=head,
        num_parameters=sum(math.prod(leaf.shape) for leaf in shapes.values()),
        stored=dict(stored),
        num_files=files,
        language=language,
        missing=tuple(missing),
    )


def _read_headers(
    directory: Path, family: Family, config: DecoderConfig
) -> tuple[Counter[str], int, str]:
    """Parameters by dtype, files, and the head."""
    stored: Counter[str] = Counter()
    with open_tensors(directory) as tensors:
        for name in tensors.file_of:
            stored[tensors.dtype(name)] += math.prod(tensors.shape(name))
        is_bare = config.tie_embeddings or family.lm_head.name not in tensors.file_of
        is_classifier = SCORE.name in tensors.file_of and is_bare
        files = len(set(tensors.file_of.values()))
    return stored, files, "reward" if is_classifier else "lm"

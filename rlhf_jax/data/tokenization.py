"""Encoding and decoding of text, shared by all stages."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.algo.types import Prompts
from rlhf_jax.data.text_encoder import TextEncoder
from rlhf_jax.models.chat import check_spells_none, render_chat, special_token_pattern
from rlhf_jax.models.hf.checkpoint import Checkpoint, open_checkpoint
from rlhf_jax.models.hf.generation_config import read_eos_ids, read_generation_config
from rlhf_jax.models.tokenizer import load_tokenizer, read_num_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Tokenization:
    """A tokenizer and the generation config of its model."""

    tokenizer: "PreTrainedTokenizerBase"
    # `generation_config.json` of the checkpoint, saved with the model; may be empty.
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Ids that end a response, in addition to the tokenizer's EOS.
    end_ids: frozenset[int] = frozenset()
    # Number of embeddings of the model; None: no check.
    num_embeddings: int | None = None

    @classmethod
    def load(cls, path: str | Path | Checkpoint) -> "Tokenization":
        """The tokenizer of a checkpoint, and the tokens that end its responses.

        Args:
            path: what `open_checkpoint` takes.
        """
        checkpoint = open_checkpoint(path)
        tokenizer = load_tokenizer(checkpoint.tokenizer_directory)
        directory, own = checkpoint.directory, tokenizer.eos_token_id
        ends = {i for i in read_eos_ids(directory) if i < len(tokenizer) and i != own}
        return cls(
            tokenizer,
            generation_config=read_generation_config(directory),
            end_ids=frozenset(ends),
            num_embeddings=read_num_embeddings(directory),
        )

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        """Text to token ids."""
        return TextEncoder(
            tokenizer=self.tokenizer,
            eos_id=self.eos_id,
            bos_id=self.bos_id,
            end_ids=self.end_ids,
            num_ids=self.num_embeddings,
        )

    @property
    def generation_config_to_save(self) -> dict[str, Any]:
        """`generation_config`, with all end ids as its EOS ids."""
        given = self.generation_config.get("eos_token_id")
        listed = given if isinstance(given, list) else [given]
        missing = sorted({self.eos_id, *self.end_ids} - set(listed))
        ids = [i for i in listed if i is not None] + missing
        if missing:
            given = ids if len(ids) > 1 else ids[0]
        return {**self.generation_config, "eos_token_id": given}

    @property
    def eos_id(self) -> int:
        """Appended to responses without an end id."""
        return self.tokenizer.eos_token_id  # pyright: ignore[reportReturnType]

    @property
    def pad_id(self) -> int:
        """The padding id; may be EOS."""
        return self.tokenizer.pad_token_id  # pyright: ignore[reportReturnType]

    @property
    def bos_id(self) -> int | None:
        """The BOS id, for tokenizers that prepend it; else None."""
        bos = self.tokenizer.bos_token_id
        starts_with_bos = self.tokenizer("a")["input_ids"][:1] == [bos]
        return bos if starts_with_bos else None  # pyright: ignore[reportReturnType]

    def stop_ids(self, texts: Sequence[str]) -> tuple[int, ...]:
        """All end ids, and the ids of `texts`.

        Raises:
            ValueError: if a text is not exactly one token.
        """
        stops = {self.eos_id, *self.end_ids}
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(
                    f"stop={text!r} is {len(ids)} tokens of this tokenizer; give text "
                    "that is one token"
                )
            stops.add(ids[0])
        return tuple(sorted(stops))

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> str:
        """Chat messages as one text.

        Raises:
            ValueError: one line, if the chat template rejects them or one of them
                contains a special token.
        """
        check_spells_none(messages, self._special)
        return render_chat(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt
        )

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        added = self.tokenizer.added_tokens_decoder.items()
        marked = [i for i, token in added if token.special]
        return frozenset([*self.tokenizer.all_special_ids, *marked])

    def num_ordinary_tokens(self) -> int:
        """One more than the largest id that text or end ids can have.

        Special tokens may be beyond it: the text models of Gemma 3 share a tokenizer
        with vision models, and have no embeddings for image tokens.
        """
        special = self.special_ids - {self.eos_id}
        ids = self.tokenizer.get_vocab().values()
        return 1 + max(i for i in ids if i not in special)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return special_token_pattern(self.tokenizer)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Texts of right-padded rows, without special tokens."""
        rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def decode_prompts(self, prompts: Prompts) -> list[str]:
        """Texts of left-padded host prompts, without special tokens."""
        tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
        rows = [
            row[len(row) - n :].tolist() for row, n in zip(tokens, lengths, strict=True)
        ]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def check_same_as(self, other: "Tokenization", name: str, path: str) -> None:
        """Raises ValueError unless both have the same tokens, EOS and BOS."""
        mine, theirs = (
            (x.tokenizer.get_vocab(), x.eos_id, x.bos_id) for x in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"{name}={path!r}: its tokenizer differs from the policy's; give a "
                "model with the same tokenizer"
            )

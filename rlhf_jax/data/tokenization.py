"""Text to tokens and back, as all stages do it."""

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
from rlhf_jax.models.hf.generation_config import read_eos_ids, read_generation_config
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.peft_loading import text_directories
from rlhf_jax.models.tokenizer import load_tokenizer, read_num_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Tokenization:
    """A tokenizer, what the stages ask of it, and how its model wants to generate."""

    tokenizer: "PreTrainedTokenizerBase"
    # `generation_config.json` of the checkpoint, to be written again; may be empty.
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # What ends an answer besides the tokenizer's EOS.
    end_ids: frozenset[int] = frozenset()
    # How many tokens the model has embeddings for; None: for all.
    num_embeddings: int | None = None

    @classmethod
    def load(
        cls, path: str | Path, *, base: str | Path | None = None
    ) -> "Tokenization":
        """The tokenizer and the ends of answers of a Hugging Face directory.

        Of an adapter, `base` takes the place of the base model that it names.
        """
        text, path = text_directories(
            local_directory(path), None if base is None else local_directory(base)
        )
        tokenizer = load_tokenizer(text)
        own = tokenizer.eos_token_id
        ends = {i for i in read_eos_ids(path) if i < len(tokenizer) and i != own}
        return cls(
            tokenizer,
            generation_config=read_generation_config(path),
            end_ids=frozenset(ends),
            num_embeddings=read_num_embeddings(path),
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
        """`generation_config`, its EOS ids complete with whatever ends answers here."""
        given = self.generation_config.get("eos_token_id")
        listed = given if isinstance(given, list) else [given]
        missing = sorted({self.eos_id, *self.end_ids} - set(listed))
        ids = [i for i in listed if i is not None] + missing
        if missing:
            given = ids if len(ids) > 1 else ids[0]
        return {**self.generation_config, "eos_token_id": given}

    @property
    def eos_id(self) -> int:
        """Ends every answer that has no other end."""
        return self.tokenizer.eos_token_id  # pyright: ignore[reportReturnType]

    @property
    def pad_id(self) -> int:
        """Fills up rows; may be the EOS."""
        return self.tokenizer.pad_token_id  # pyright: ignore[reportReturnType]

    @property
    def bos_id(self) -> int | None:
        """Begins every sequence, for tokenizers that put it there; else None."""
        bos = self.tokenizer.bos_token_id
        starts_with_bos = self.tokenizer("a")["input_ids"][0] == bos
        return bos if starts_with_bos else None  # pyright: ignore[reportReturnType]

    def stop_ids(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Whatever ends an answer, and the single tokens that `texts` are.

        Raises:
            ValueError: where a text is not exactly one token.
        """
        stops = {self.eos_id, *self.end_ids}
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(
                    f"stop={text!r} is {len(ids)} tokens of this tokenizer; an answer "
                    "stops at single tokens only"
                )
            stops.add(ids[0])
        return tuple(sorted(stops))

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
    ) -> str:
        """Chat messages as one text.

        Raises:
            ValueError: one line, where the chat template refuses them, or one of them
                spells a special token.
        """
        check_spells_none(messages, self._special)
        return render_chat(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt
        )

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that steer the model instead of being read as text."""
        added = self.tokenizer.added_tokens_decoder.items()
        marked = [i for i, token in added if token.special]
        return frozenset([*self.tokenizer.all_special_ids, *marked])

    def num_ordinary_tokens(self) -> int:
        """One more than the last id that text or the end of an answer may become.

        Special tokens may lie beyond it: the text models of Gemma 3 share a tokenizer
        with models that read pictures, and have no embedding for those.
        """
        special = self.special_ids - {self.eos_id}
        ids = self.tokenizer.get_vocab().values()
        return 1 + max(i for i in ids if i not in special)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return special_token_pattern(self.tokenizer)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Texts of right-padded rows, special tokens left out."""
        rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def decode_prompts(self, prompts: Prompts) -> list[str]:
        """Texts of left-padded host prompts, special tokens left out."""
        tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
        rows = [
            row[len(row) - n :].tolist() for row, n in zip(tokens, lengths, strict=True)
        ]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def check_same_as(self, other: "Tokenization", name: str, path: str) -> None:
        """Raises ValueError unless tokens, EOS and BOS of the two are the same."""
        mine, theirs = (
            (x.tokenizer.get_vocab(), x.eos_id, x.bos_id) for x in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"{name}={path!r}: its tokenizer differs from the policy's; the models "
                "of one run read the same token ids"
            )

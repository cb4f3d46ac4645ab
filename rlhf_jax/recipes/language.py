"""Text to tokens and back, as all stages do it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.algo.types import Prompts
from rlhf_jax.models.tokenizer import load_tokenizer, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Language:
    """A tokenizer, and what the stages ask of it."""

    tokenizer: "PreTrainedTokenizerBase"

    @classmethod
    def load(cls, path: str) -> "Language":
        """The tokenizer of a Hugging Face directory."""
        return cls(load_tokenizer(path))

    @property
    def eos_id(self) -> int:
        """Ends every answer."""
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
        """EOS and the single tokens that `texts` are.

        Raises:
            ValueError: where a text is not exactly one token.
        """
        stops = {self.eos_id}
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
        """Chat messages as one text."""
        return render_chat(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt
        )

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

    def check_same_as(self, other: "Language", name: str, path: str) -> None:
        """Raises ValueError unless tokens, EOS and BOS of the two are the same."""
        mine, theirs = (
            (x.tokenizer.get_vocab(), x.eos_id, x.bos_id) for x in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"{name}={path!r}: its tokenizer differs from the policy's; the models "
                "of one run read the same token ids"
            )

"""Tokenizers of Hugging Face checkpoints, and a small one trained from text."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.models.hf.hub import local_directory

if TYPE_CHECKING:  # takes over a second; `rlhf-jax --help` should not wait for it
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<|pad|>"


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Reads the tokenizer of a checkpoint, from the disk alone.

    Pads on the left, as prompts are. A tokenizer without a pad token pads with EOS: no
    mask here is ever made by comparing ids. Text that spells a special token, as chat
    templates write it, becomes that one token, even where the tokenizer's files ask for
    `split_special_tokens`; a tokenizer saved after that no longer asks.

    Args:
        path: directory, or name on the Hub (`hub.local_directory`).

    Raises:
        ValueError: there is no such tokenizer, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    path = local_directory(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; a tokenizer is read from one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,  # left open, it would ask on the terminal
            padding_side="left",
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} holds no tokenizer that can be read: {reason}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no EOS token, so no answer could ever end; "
            "set eos_token in its tokenizer_config.json"
        )
    tokenizer.split_special_tokens = False
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_num_embeddings(path: str | Path) -> int | None:
    """How many tokens a checkpoint has embeddings for; None where no file says."""
    try:
        fields = json.loads((Path(path) / "config.json").read_text("utf-8"))
        size = fields.get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads the model says what is wrong
    return size if isinstance(size, int) else None


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2
) -> "PreTrainedTokenizerFast":
    """Byte-level BPE learned from text; the same texts give the same tokenizer.

    All 256 bytes are tokens, so any text comes back unchanged from encoding and
    decoding. `tokenizer.save_pretrained(path)` writes it, `load_tokenizer` reads it.

    Args:
        texts: what to learn merges from; may be empty (bytes only).
        vocab_size: largest number of tokens, special tokens included, at least 258;
            few texts may give fewer, so size models by `len(tokenizer)`.
        min_frequency: a pair must occur this often to be merged.

    Returns:
        A tokenizer with EOS (also BOS) `<|endoftext|>` and a pad token of its own,
        `<|pad|>`. It adds neither to the texts it encodes.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the special tokens.

    References:
        Radford et al., 2019, "Language models are unsupervised multitask learners".
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len((EOS, PAD))
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small; 256 bytes and 2 special tokens "
            f"need at least {smallest}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,  # transformers 4 drops some by default
    )


def token_texts(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]
) -> list[str]:
    """What each token adds to the text of those before it.

    The texts together are the text of all. Of a character that several tokens spell,
    the last has all and the others have "".

    Args:
        tokenizer: which the tokens are of.
        tokens: ids, special ones too, whose texts are given like any other's.
    """
    texts: list[str] = []
    # A character or token is decoded after the one before it: alone it may lose its
    # space. `known` is the text of the one before, tokens[before:begin].
    known, before, begin = "", 0, 0
    for end in range(1, len(tokens) + 1):
        text = _decode(tokenizer, tokens[before:end])
        if text.endswith("\ufffd") and end < len(tokens):  # part of a character
            texts.append("")
            continue
        texts.append(text[len(known) :])
        known = _decode(tokenizer, tokens[begin:end])
        before, begin = begin, end
    return texts


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # lists of lists give lists
    return text

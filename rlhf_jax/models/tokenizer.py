"""Tokenizers of Hugging Face checkpoints, and a small one trained from text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes over a second; `rlhf-jax --help` should not wait for it
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<|pad|>"

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Reads the tokenizer of a checkpoint, from the disk alone.

    Pads on the left, as prompts are. A tokenizer without a pad token pads with EOS: no
    mask here is ever made by comparing ids.

    Args:
        path: local directory.

    Raises:
        ValueError: there is no such tokenizer, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; a tokenizer is read from one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, padding_side="left"
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
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def render_chat(
    tokenizer: "PreTrainedTokenizerBase | None",
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Without a template: `"\\n\\nHuman: …\\n\\nAssistant: …"`, after the system message
    if the conversation starts with one (the format of Anthropic's HH data). An answer
    to such a prompt starts with a space.

    Args:
        tokenizer: with or without a chat template; None has none. Templates write
            special tokens into the text: encode it with `add_special_tokens=False`.
        messages: each with a `"role"` (`"system"`, `"user"`, `"assistant"`) and its
            `"content"`.
        add_generation_prompt: end with the start of the assistant's turn.

    Raises:
        ValueError: no messages, or a role that the default format does not have.

    References:
        Bai et al., 2022, arXiv:2204.05862.
    """
    if not messages:
        raise ValueError("messages is empty; a conversation has at least one")
    if tokenizer is not None and tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return str(text)
    text = ""
    for i, message in enumerate(messages):
        if i == 0 and message["role"] == "system":
            text = message["content"]
        elif message["role"] in _SPEAKERS:
            text += f"\n\n{_SPEAKERS[message['role']]}: {message['content']}"
        else:
            raise ValueError(
                f"messages[{i}] has role={message['role']!r}; without a chat template "
                "a conversation has 'user' and 'assistant', and 'system' only first"
            )
    return text + ("\n\nAssistant:" if add_generation_prompt else "")

"""Loads tokenizers of Hugging Face checkpoints, and trains small ones."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.foreign_errors import one_line_errors
from rlhf_jax.files.regular_file import model_file
from rlhf_jax.files.typed_fields import integer
from rlhf_jax.models.hf.hub import local_directory
from rlhf_jax.models.hf.tokenizer_files import check_tokenizer_files

if TYPE_CHECKING:  # slow import; keeps `rlhf-jax --help` fast
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<|pad|>"


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a checkpoint, without network access.

    Pads on the left, like prompts. A tokenizer without a pad token pads with EOS,
    because masks are never computed from ids. The text of a special token, as written
    by chat templates, is encoded as that token, even if the tokenizer's files set
    `split_special_tokens`; saving the tokenizer then removes that setting.

    Args:
        path: directory, or name on the Hub (`hub.local_directory`).

    Raises:
        ValueError: if there is no such tokenizer, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    path = local_directory(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give a tokenizer directory")
    check_tokenizer_files(path)
    with one_line_errors(f"{path} has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,  # otherwise it would ask on the terminal
            padding_side="left",
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no EOS token, so responses could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    tokenizer.split_special_tokens = False
    for name in ("is_local", "local_files_only"):  # of this load; would be saved
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_num_embeddings(path: str | Path) -> int | None:
    """The number of token embeddings of a checkpoint; None if unknown."""
    try:
        fields = read_object(model_file(Path(path), "config.json"))
        return integer(fields, "vocab_size")
    except ValueError:
        return None  # loading the model reports the problem


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2
) -> "PreTrainedTokenizerFast":
    """Trains a byte-level BPE, deterministically.

    All 256 bytes are tokens, so encoding and decoding restores any text.
    `tokenizer.save_pretrained(path)` saves it, `load_tokenizer` loads it.

    Args:
        texts: training texts; may be empty (bytes only).
        vocab_size: maximum number of tokens, including special tokens, at least 258;
            few texts may give fewer, so size models by `len(tokenizer)`.
        min_frequency: a pair must occur this often to be merged.

    Returns:
        A tokenizer with EOS (also BOS) `<|endoftext|>` and a separate pad token,
        `<|pad|>`. It adds neither when encoding.

    Raises:
        ValueError: if `vocab_size` is too small for the bytes and the special tokens.

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
    """The text that each token adds to the text before it.

    The concatenation is the full text. If several tokens form one character, the last
    one has it and the others have "".

    Args:
        tokenizer: of the tokens.
        tokens: ids, including special tokens, which get text too.
    """
    texts: list[str] = []
    # A token is decoded after the previous one: alone it may lose its space. `known` is
    # the text of the previous one, tokens[before:begin].
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
    with one_line_errors("the tokenizer cannot decode a token"):
        text = tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    assert isinstance(text, str)  # lists of lists give lists
    return text

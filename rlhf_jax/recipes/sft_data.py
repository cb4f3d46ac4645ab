"""Texts, answers and conversations as the batches and held-out rows of `sft`."""

import dataclasses
from functools import partial

from rlhf_jax.algo.types import Demonstrations
from rlhf_jax.models.chat import set_chat_template
from rlhf_jax.models.tokenizer import train_tokenizer
from rlhf_jax.recipes.configs import SFTConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.texts import hold_out_groups, read_reported
from rlhf_jax.runtime.batches import Batches, pad_examples
from rlhf_jax.runtime.encoding import Encoded, EncodedExample, encode_examples
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.text_data import Columns, Example, read_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTData:
    """What a language model imitates and is measured on."""

    batches: Batches  # of `Demonstrations`
    held_out: Demonstrations
    width: int  # of every sequence


def read_sft_data(config: SFTConfig) -> tuple[Language, SFTData]:
    """Reads, splits and encodes; prints what was found and left out.

    Returns:
        The model's language, or one that was learnt from the texts, and the data.

    Raises:
        ValueError: one line, on bad input.
    """
    given = load_language(config)
    examples = read_data(config, config.data, given)
    eval_examples = (
        None if config.eval_data is None else read_data(config, config.eval_data, given)
    )
    language = given or _learn_language(config, examples)
    return language, _encode(config, language, examples, eval_examples)


def load_language(config: SFTConfig) -> Language | None:
    """The model's, with the chat template of the run; None where there is no model."""
    if config.model is None:
        return None
    language = Language.load(config.model)
    if config.chat_template is not None:
        set_chat_template(
            language.tokenizer, config.chat_template, name="chat-template"
        )
    return language


def read_data(config: SFTConfig, path: str, language: Language | None) -> list[Example]:
    """The examples of a file; says how many rows were left out, and why."""
    # A tokenizer that is still to be learnt writes conversations as any fresh one.
    language = language or Language(train_tokenizer([], vocab_size=258))
    read = partial(
        read_examples,
        columns=Columns(
            prompt=config.prompt_column, completion=config.completion_column
        ),
        render_chat=language.render,
        on_unusable=config.unusable_rows,
        train_on=config.train_on,
    )
    return read_reported(path, read, quiet=config.quiet)


def encode_data(
    config: SFTConfig, language: Language, examples: list[Example]
) -> Encoded[EncodedExample]:
    """The tokens of examples, and which of them are learnt."""
    return encode_examples(
        examples,
        language.encoder,
        max_tokens=config.max_tokens,
        overlong=config.overlong,
    )


def too_long(encoded: Encoded) -> str:
    """What became of rows beyond the limit, for a heading."""
    cut = f", {encoded.answers_cut} earlier answers cut off" * bool(encoded.answers_cut)
    return f"too long: {encoded.dropped} dropped, {encoded.truncated} truncated{cut}"


def _learn_language(config: SFTConfig, examples: list[Example]) -> Language:
    texts = (example.prompt + example.completion for example in examples)
    return Language(train_tokenizer(texts, vocab_size=config.fresh.vocab_size))


def _encode(
    config: SFTConfig,
    language: Language,
    examples: list[Example],
    eval_examples: list[Example] | None,
) -> SFTData:
    encoded = encode_data(config, language, examples)
    width = encoded.width
    if eval_examples is None:
        # By prompt; of plain text, where one example is many rows, by row.
        groups = [
            examples[source].prompt or number
            for number, source in enumerate(encoded.sources)
        ]
        training, held_out = hold_out_groups(
            encoded.rows, groups, config.eval_fraction, config.seed
        )
    else:
        encoded_eval = encode_data(config, language, eval_examples)
        training, held_out = encoded.rows, encoded_eval.rows
        width = max(width, encoded_eval.width)
    heading(
        f"sft: {len(training)} training and {len(held_out)} held-out sequences of at "
        f"most {width} tokens; {too_long(encoded)}",
        quiet=config.quiet,
    )
    collate = partial(pad_examples, width=width, pad_id=language.pad_id)
    return SFTData(
        batches=Batches(
            training, collate, batch_size=config.batch_size, seed=config.seed
        ),
        held_out=collate(held_out),
        width=width,
    )

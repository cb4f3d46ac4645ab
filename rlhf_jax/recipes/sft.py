"""Stage 1: a language model learns to imitate texts, or answers to prompts."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Demonstrations, Params
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.data.batches import Batches, pad_examples
from rlhf_jax.data.encoding import Encoded, EncodedExample, encode_examples
from rlhf_jax.data.text_data import Columns, Example, read_examples
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.learner.imitation import (
    count_targets,
    imitation_losses,
    imitation_objective,
)
from rlhf_jax.models.callables import policy
from rlhf_jax.models.chat import set_chat_template
from rlhf_jax.models.tokenizer import train_tokenizer
from rlhf_jax.recipes.networks import (
    Network,
    Networks,
    check_fits,
    configured,
    fresh_network,
)
from rlhf_jax.recipes.splits import hold_out_groups, read_reported
from rlhf_jax.recipes.supervised_loop import SupervisedStage, train
from rlhf_jax.run.devices import make_mesh, map_batches
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTData:
    """What a language model imitates and is measured on."""

    batches: Batches  # of `Demonstrations`
    held_out: Demonstrations
    width: int  # of every sequence


def read_sft_data(config: SFTConfig) -> tuple[Tokenization, SFTData]:
    """Reads, splits and encodes; prints what was found and left out.

    Returns:
        The model's language, or one that was learnt from the texts, and the data.

    Raises:
        ValueError: one line, on bad input.
    """
    given = load_tokenization(config)
    examples = read_data(config, config.data, given)
    eval_examples = (
        None if config.eval_data is None else read_data(config, config.eval_data, given)
    )
    tokenization = given or _learn_tokenization(config, examples)
    return tokenization, _encode(config, tokenization, examples, eval_examples)


def load_tokenization(config: SFTConfig) -> Tokenization | None:
    """The model's, with the chat template of the run; None where there is no model."""
    if config.model is None:
        return None
    tokenization = Tokenization.load(config.model)
    if config.chat_template is not None:
        set_chat_template(
            tokenization.tokenizer, config.chat_template, name="chat-template"
        )
    return tokenization


def read_data(
    config: SFTConfig, path: str, tokenization: Tokenization | None
) -> list[Example]:
    """The examples of a file; says how many rows were left out, and why."""
    # A tokenizer that is still to be learnt writes conversations as any fresh one.
    tokenization = tokenization or Tokenization(train_tokenizer([], vocab_size=258))
    read = partial(
        read_examples,
        columns=Columns(
            prompt=config.prompt_column, completion=config.completion_column
        ),
        render_chat=tokenization.render,
        on_unusable=config.unusable_rows,
        train_on=config.train_on,
    )
    return read_reported(path, read, quiet=config.quiet)


def encode_data(
    config: SFTConfig, tokenization: Tokenization, examples: list[Example]
) -> Encoded[EncodedExample]:
    """The tokens of examples, and which of them are learnt."""
    return encode_examples(
        examples,
        tokenization.encoder,
        max_tokens=config.max_tokens,
        overlong=config.overlong,
    )


def too_long(encoded: Encoded) -> str:
    """What became of rows beyond the limit, for a heading."""
    cut = f", {encoded.answers_cut} earlier answers cut off" * bool(encoded.answers_cut)
    return f"too long: {encoded.dropped} dropped, {encoded.truncated} truncated{cut}"


def _learn_tokenization(config: SFTConfig, examples: list[Example]) -> Tokenization:
    texts = (example.prompt + example.completion for example in examples)
    return Tokenization(train_tokenizer(texts, vocab_size=config.fresh.vocab_size))


def _encode(
    config: SFTConfig,
    tokenization: Tokenization,
    examples: list[Example],
    eval_examples: list[Example] | None,
) -> SFTData:
    encoded = encode_data(config, tokenization, examples)
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
        encoded_eval = encode_data(config, tokenization, eval_examples)
        training, held_out = encoded.rows, encoded_eval.rows
        width = max(width, encoded_eval.width)
    heading(
        f"sft: {len(training)} training and {len(held_out)} held-out sequences of at "
        f"most {width} tokens; {too_long(encoded)}",
        quiet=config.quiet,
    )
    collate = partial(pad_examples, width=width, pad_id=tokenization.pad_id)
    return SFTData(
        batches=Batches(
            training, collate, batch_size=config.batch_size, seed=config.seed
        ),
        held_out=collate(held_out),
        width=width,
    )


def run(config: SFTConfig) -> RunDirectory:
    """Trains, and writes the model as a Hugging Face directory.

    Raises:
        ValueError: on bad input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: on a loss or gradient that is no number.
    """
    check_start(config, stage="sft")
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)

    # ---- text ----
    tokenization, data = read_sft_data(config)

    # ---- model ----
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    network, params = _network(config, tokenization, mesh, init_key)
    module = network.module
    check_fits(
        module, tokenization, needed=data.width, name="the model", why="max-tokens"
    )
    token_logprobs = policy(module).token_logprobs

    # ---- train ----
    stage = SupervisedStage(
        name="sft",
        objective=imitation_objective(token_logprobs),
        count=count_targets,
        evaluate=make_evaluation(
            jax.jit(imitation_losses(token_logprobs)),
            data.held_out,
            batch_size=config.batch_size,
            mesh=mesh,
        ),
        batches=data.batches,
        tokens_per_step=config.batch_size * data.width,
        shown={"loss": "train/loss", "held-out loss": "eval/loss"},
    )
    return train(
        config,
        stage,
        network,
        params,
        key=run_key,
        tokenization=tokenization,
        mesh=mesh,
    )


def make_evaluation(
    losses_fn: Callable[[Params, Demonstrations], Array],
    rows: Demonstrations,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Callable[[Params], dict[str, float]]:
    """Loss and perplexity per target token on held-out rows, by parameters."""
    num_targets = int(np.sum(np.asarray(rows.target_mask)[:, 1:]))

    def evaluate(params: Params) -> dict[str, float]:
        losses = map_batches(
            lambda _, batch: losses_fn(params, batch),
            rows,
            batch_size=batch_size,
            mesh=mesh,
        )
        loss = float(np.sum(losses)) / num_targets
        with np.errstate(over="ignore"):  # beyond a loss of 709 it is infinite
            perplexity = float(np.exp(loss))
        return {"eval/loss": loss, "eval/perplexity": perplexity}

    return evaluate


def _network(
    config: SFTConfig, tokenization: Tokenization, mesh: Mesh, key: Array
) -> tuple[Network, Params]:
    if config.model is not None:
        return Networks(config, mesh).trained(config.model, "lm")
    module, params = fresh_network(
        config.fresh, vocab_size=len(tokenization.tokenizer), key=key
    )
    return Network(module=configured(module, config)), params

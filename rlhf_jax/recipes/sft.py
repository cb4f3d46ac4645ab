"""Stage 1: supervised fine-tuning on texts, or on responses to prompts.

Start with `train`, the training loop.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
from rlhf_jax.learner.train_state import ModelState
from rlhf_jax.models.callables import policy
from rlhf_jax.models.chat import set_chat_template
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.recipes.networks import Networks, check_adapters, check_fits, fresh_shape
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.recipes.splits import hold_out_groups, read_reported
from rlhf_jax.recipes.supervised_run import (
    SupervisedRun,
    SupervisedSetup,
    supervised_setup,
)
from rlhf_jax.run.devices import make_mesh, map_batches, put_batch
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start
from rlhf_jax.run.stopwatch import Stopwatch

SHOWN = {"loss": "train/loss", "held-out loss": "eval/loss"}


def run(config: SFTConfig) -> RunDirectory:
    """Trains and saves the model as a Hugging Face directory.

    Raises:
        ValueError: for invalid input, before anything is compiled.
        Interrupted: after a checkpoint, when asked to stop.
        NonFiniteError: if a loss or gradient is not finite.
    """
    # Validate all input before reading weights.
    check_start(config)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    tokenization, data = read_sft_data(config)
    shape = model_shape(config, tokenization)
    check_adapters(config, shape)
    check_fits(
        shape,
        tokenization,
        needed=data.width,
        name="the model",
        why="max-tokens",
    )

    sft = setup(config, Networks(config, mesh), shape)
    with SupervisedRun(
        config,
        sft,
        evaluate=make_evaluation(
            jax.jit(imitation_losses(policy(sft.network.module).token_logprobs)),
            data.held_out,
            batch_size=config.batch_size,
            mesh=mesh,
        ),
        tokenization=tokenization,
        tokens_per_step=config.batch_size * data.width,
        shown=SHOWN,
    ) as sft_run:
        state = train(sft, sft_run, data.batches, mesh)
        sft_run.save(state)
    sft_run.report()
    return sft_run.directory


def train(
    sft: SupervisedSetup, run: SupervisedRun, batches: Batches, mesh: Mesh
) -> ModelState:
    """The training loop."""
    state = run.restore(sft.state)
    run.evaluate_start(state)

    for step in run.steps():
        clock = Stopwatch()

        # Prompts and responses, or plain texts. The loss is the cross-entropy on the
        # tokens of `target_mask`: responses and their end tokens, not prompts.
        batch = put_batch(mesh, batches[step - 1])

        # One compiled program, to which the old state is donated.
        state, metrics = sft.update(state, batch, sft.network.frozen)

        state = run.finish(step, state, metrics, batch, clock)
    return state


def setup(
    config: SFTConfig, networks: Networks, shape: DecoderConfig
) -> SupervisedSetup:
    """Network, optimizer, state and compiled step of a run.

    Args:
        config: validated configuration.
        networks: builds the network, or its shapes.
        shape: shape of a network that is trained from scratch.
    """
    init_key, run_key = jax.random.split(seed_key(config.seed))
    if config.model is None:
        network, params = networks.fresh(shape, init_key)
    else:
        network, params = networks.trained(config.model, "lm")
    return supervised_setup(
        config,
        networks,
        network,
        params,
        key=run_key,
        objective=imitation_objective(policy(network.module).token_logprobs),
        count=count_targets,
    )


def model_shape(config: SFTConfig, tokenization: Tokenization) -> DecoderConfig:
    """Shape of the checkpoint to fine-tune, or of a model trained from scratch."""
    if config.model is not None:
        return open_checkpoint(config.model).config
    return fresh_shape(config.fresh, vocab_size=len(tokenization.tokenizer))


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
        with np.errstate(over="ignore"):  # infinite above a loss of 709
            perplexity = float(np.exp(loss))
        return {"eval/loss": loss, "eval/perplexity": perplexity}

    return evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTData:
    """Training and held-out data of a language model."""

    batches: Batches  # of `Demonstrations`
    held_out: Demonstrations
    width: int  # of every sequence


def read_sft_data(config: SFTConfig) -> tuple[Tokenization, SFTData]:
    """Reads, splits and encodes; prints how many rows are used and dropped.

    Returns:
        The model's tokenization, or one trained on the texts, and the data.

    Raises:
        ValueError: one line, for invalid input.
    """
    given = load_tokenization(config)
    examples = read_data(config, config.data, given)
    eval_examples = (
        None if config.eval_data is None else read_data(config, config.eval_data, given)
    )
    tokenization = given or _learn_tokenization(config, examples)
    return tokenization, _encode(config, tokenization, examples, eval_examples)


def load_tokenization(config: SFTConfig) -> Tokenization | None:
    """The model's, with the chat template of the run; None if there is no model."""
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
    """The examples of a file; prints how many rows were dropped, and why."""
    # A tokenizer that is not trained yet has the same chat format as any new one.
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
    """The tokens of examples, and a mask of those that are trained on."""
    return encode_examples(
        examples,
        tokenization.encoder,
        max_tokens=config.max_tokens,
        overlong=config.overlong,
    )


def too_long(encoded: Encoded) -> str:
    """Counts of rows above the length limit, for a heading."""
    cut = f", {encoded.answers_cut} earlier responses cut off" * bool(
        encoded.answers_cut
    )
    return f"too long: {encoded.dropped} dropped, {encoded.truncated} truncated{cut}"


def _learn_tokenization(config: SFTConfig, examples: list[Example]) -> Tokenization:
    kept = RunDirectory(Path(config.run_dir)).tokenizer
    if config.resume and kept.is_dir():  # the data may have changed
        return Tokenization(load_tokenizer(kept))
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
        # By prompt; by row for plain text, where one example gives many rows.
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

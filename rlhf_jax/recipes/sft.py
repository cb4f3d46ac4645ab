"""Stage 1: a language model learns to imitate texts, or answers to prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Array, Demonstrations, Params
from rlhf_jax.learner.imitation import imitation_losses, imitation_objective
from rlhf_jax.learner.supervised import count_targets
from rlhf_jax.models.callables import policy
from rlhf_jax.models.tokenizer import render_chat, train_tokenizer
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.recipes.batched import map_batches
from rlhf_jax.recipes.configs import SFTConfig
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import (
    check_fits,
    configured,
    fresh_network,
    trained_network,
)
from rlhf_jax.recipes.session import check_start
from rlhf_jax.recipes.supervised import SupervisedStage, train
from rlhf_jax.recipes.texts import hold_out_groups, read_reported
from rlhf_jax.runtime.batches import Batches, pad_examples
from rlhf_jax.runtime.encoding import encode_examples
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.run_directory import RunDirectory
from rlhf_jax.runtime.text_data import Columns, Example, read_examples


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
    given = Language.load(config.model) if config.model else None
    examples, eval_examples = _read(config, given)
    language = given or _learn_language(config, examples)
    batches, held_out, width = _encode(config, language, examples, eval_examples)

    # ---- model ----
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    module, params = _network(config, language, mesh, init_key)
    check_fits(module, language, needed=width, name="the model", why="max-tokens")
    token_logprobs = policy(module).token_logprobs

    # ---- train ----
    stage = SupervisedStage(
        name="sft",
        objective=imitation_objective(token_logprobs),
        count=count_targets,
        evaluate=make_evaluation(
            jax.jit(imitation_losses(token_logprobs)),
            held_out,
            batch_size=config.batch_size,
            mesh=mesh,
        ),
        batches=batches,
        tokens_per_step=config.batch_size * width,
        shown={"loss": "train/loss", "held-out loss": "eval/loss"},
    )
    return train(
        config, stage, module, params, key=run_key, language=language, mesh=mesh
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
        return {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))}

    return evaluate


def _read(
    config: SFTConfig, language: Language | None
) -> tuple[list[Example], list[Example] | None]:
    """Examples, and those of `eval_data` if there is such a file."""
    read = partial(
        read_examples,
        columns=Columns(
            prompt=config.prompt_column, completion=config.completion_column
        ),
        render_chat=language.render if language else _render_default,
        on_unusable=config.unusable_rows,
    )
    examples = read_reported(config.data, read, quiet=config.quiet)
    if config.eval_data is None:
        return examples, None
    return examples, read_reported(config.eval_data, read, quiet=config.quiet)


def _render_default(
    messages: Sequence[Mapping[str, str]], add_generation_prompt: bool
) -> str:
    return render_chat(None, messages, add_generation_prompt=add_generation_prompt)


def _learn_language(config: SFTConfig, examples: list[Example]) -> Language:
    texts = (example.prompt + example.completion for example in examples)
    return Language(train_tokenizer(texts, vocab_size=config.fresh.vocab_size))


def _encode(
    config: SFTConfig,
    language: Language,
    examples: list[Example],
    eval_examples: list[Example] | None,
) -> tuple[Batches, Demonstrations, int]:
    """Training batches, held-out rows, and the width of both."""
    encode = partial(
        encode_examples,
        tokenizer=language.tokenizer,
        max_tokens=config.max_tokens,
        eos_id=language.eos_id,
        bos_id=language.bos_id,
        overlong=config.overlong,
    )
    encoded = encode(examples)
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
        encoded_eval = encode(eval_examples)
        training, held_out = encoded.rows, encoded_eval.rows
        width = max(width, encoded_eval.width)
    heading(
        f"sft: {len(training)} training and {len(held_out)} held-out sequences of at "
        f"most {width} tokens; too long: {encoded.dropped} dropped, "
        f"{encoded.truncated} truncated",
        quiet=config.quiet,
    )
    collate = partial(pad_examples, width=width, pad_id=language.pad_id)
    batches = Batches(training, collate, batch_size=config.batch_size, seed=config.seed)
    return batches, collate(held_out), width


def _network(
    config: SFTConfig, language: Language, mesh: Mesh, key: Array
) -> tuple[Transformer, Params]:
    if config.model is not None:
        return trained_network(config.model, config, head="lm", mesh=mesh)
    module, params = fresh_network(
        config.fresh, vocab_size=len(language.tokenizer), key=key
    )
    return configured(module, config), params

"""Held-out figures: loss of a language model, accuracy of a reward model, reward of a
policy."""

import json
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlhf_jax.learner.imitation import imitation_losses
from rlhf_jax.models.callables import policy, reward_model
from rlhf_jax.recipes import reward_model as reward_stage
from rlhf_jax.recipes import sft as sft_stage
from rlhf_jax.recipes.evaluate_policy import policy_figures, report_dropped
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, read_network
from rlhf_jax.recipes.texts import read_reported
from rlhf_jax.recipes.tool_configs import EvaluateConfig
from rlhf_jax.runtime.batches import pad_examples, pad_pairs
from rlhf_jax.runtime.encoding import encode_examples, encode_pairs
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.run_directory import write_atomic
from rlhf_jax.runtime.text_data import (
    Columns,
    read_examples,
    read_pairs,
)


def run(config: EvaluateConfig) -> dict[str, float]:
    """Measures what there is data for; prints the figures and returns them.

    Raises:
        ValueError: on bad input, before anything is compiled.
    """
    config.validate()
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh()
    figures = {}
    if config.data is not None:
        figures |= _texts(config, config.data, mesh)
    if config.pairs is not None:
        figures |= _pairs(config, config.pairs, mesh)
    if config.prompts is not None:
        figures |= policy_figures(config, config.prompts, mesh)
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:>{width}}  {value:.6g}")
    if config.output is not None:
        write_atomic(Path(config.output), json.dumps(figures, indent=2) + "\n")
    return figures


def _texts(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    assert config.model is not None  # validated
    language = Language.load(config.model)
    columns = Columns(prompt=config.prompt_column, completion=config.completion_column)
    read = partial(read_examples, columns=columns, render_chat=language.render)
    encoded = encode_examples(
        read_reported(path, read, quiet=False)[: config.limit],
        language.encoder,
        max_tokens=config.max_tokens,
    )
    report_dropped(path, encoded.dropped)
    module, params = read_network(config.model, head="lm", dtype=config.dtype)
    check_fits(module, language, needed=encoded.width, name="model", why="max-tokens")
    evaluate = sft_stage.make_evaluation(
        jax.jit(imitation_losses(policy(module).token_logprobs)),
        pad_examples(encoded.rows, width=encoded.width, pad_id=language.pad_id),
        batch_size=min(config.batch_size, len(encoded.rows)),
        mesh=mesh,
    )
    return {"texts": len(encoded.rows)} | _named("texts", evaluate(params))


def _pairs(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    assert config.reward_model is not None  # validated
    language = Language.load(config.reward_model)
    read = partial(
        read_pairs,
        render_chat=language.render,
        on_unusable=config.unusable_pairs,
    )
    encoded = encode_pairs(
        read_reported(path, read, quiet=False)[: config.limit],
        language.encoder,
        max_tokens=config.max_tokens,
    )
    report_dropped(path, encoded.dropped)
    module, params = read_network(
        config.reward_model, head="reward", dtype=config.dtype
    )
    check_fits(
        module, language, needed=encoded.width, name="reward-model", why="max-tokens"
    )
    evaluate = reward_stage.make_evaluation(
        reward_model(module),
        pad_pairs(encoded.rows, width=encoded.width, pad_id=language.pad_id),
        batch_size=min(config.batch_size, len(encoded.rows)),
        mesh=mesh,
    )
    return {"pairs": len(encoded.rows)} | _named("pairs", evaluate(params))


def _named(group: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{name.removeprefix('eval/')}": v for name, v in figures.items()}

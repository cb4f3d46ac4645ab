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
from rlhf_jax.recipes.answers import Examiner, make_sampler
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, read_network
from rlhf_jax.recipes.texts import read_reported
from rlhf_jax.recipes.tool_configs import EvaluateConfig
from rlhf_jax.runtime.batches import pad_examples, pad_pairs, pad_prompts
from rlhf_jax.runtime.encoding import encode_examples, encode_pairs, encode_prompts
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.run_directory import write_atomic
from rlhf_jax.runtime.text_data import (
    Columns,
    read_examples,
    read_pairs,
    read_prompts,
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
        figures |= _policy(config, config.prompts, mesh)
    for name, value in figures.items():
        print(f"{name:>24}  {value:.6g}")
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
        language.tokenizer,
        max_tokens=config.max_tokens,
        eos_id=language.eos_id,
        bos_id=language.bos_id,
    )
    _report_dropped(path, encoded.dropped)
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
        language.tokenizer,
        max_tokens=config.max_tokens,
        eos_id=language.eos_id,
        bos_id=language.bos_id,
    )
    _report_dropped(path, encoded.dropped)
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


def _policy(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    assert config.model is not None  # validated
    language = Language.load(config.model)
    columns = Columns(prompt=config.prompt_column)
    read = partial(read_prompts, columns=columns, render_chat=language.render)
    encoded = encode_prompts(
        read_reported(path, read, quiet=False)[: config.limit],
        language.tokenizer,
        max_prompt_tokens=config.max_tokens,
        bos_id=language.bos_id,
    )
    _report_dropped(path, encoded.dropped)
    module, params = read_network(config.model, head="lm", dtype=config.dtype)
    needed = encoded.width + config.max_new_tokens
    check_fits(
        module, language, needed=needed, name="model", why="prompt + max-new-tokens"
    )
    reference = reward = score_fn = None
    if config.reference is not None:
        other = Language.load(config.reference)
        language.check_same_as(other, "reference", config.reference)
        reference_module, reference = read_network(
            config.reference, head="lm", dtype=config.dtype
        )
        if reference_module.config != module.config:
            raise ValueError(
                f"reference={config.reference!r}: its shape differs from that of "
                f"model={config.model!r}; the two run through one program"
            )
    if config.reward_model is not None:
        other = Language.load(config.reward_model)
        language.check_same_as(other, "reward-model", config.reward_model)
        reward_module, reward = read_network(
            config.reward_model, head="reward", dtype=config.dtype
        )
        check_fits(
            reward_module,
            language,
            needed=needed,
            name="reward-model",
            why="prompt + max-new-tokens",
        )
        score_fn = reward_model(reward_module)
    callables = policy(module)
    examiner = Examiner(
        make_sampler(
            callables,
            max_new_tokens=config.max_new_tokens,
            stop_ids=language.stop_ids(config.stop),
            temperature=config.temperature,
            pad_id=language.pad_id,
        ),
        policy=callables,
        score_fn=score_fn,
        temperature=config.temperature,
        batch_size=min(config.batch_size, len(encoded.rows)),
        mesh=mesh,
    )
    answers = examiner.answers(
        jax.random.key(config.seed),
        params,
        pad_prompts(encoded.rows, width=encoded.width, pad_id=language.pad_id),
        reference=reference,
        reward=reward,
    )
    return {"prompts": len(encoded.rows)} | _named("prompts", answers.metrics())


def _named(group: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{name.split('/')[-1]}": v for name, v in figures.items()}


def _report_dropped(path: str, count: int) -> None:
    if count:
        heading(f"{path}: {count} rows longer than max-tokens left out")

"""Held-out metrics: loss of a language model, accuracy of a reward model, reward of a
policy."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Params
from rlhf_jax.config.reward_sources import function_name
from rlhf_jax.config.tools import EvaluateConfig
from rlhf_jax.data.batches import pad_examples, pad_pairs
from rlhf_jax.data.encoding import encode_examples, encode_pairs
from rlhf_jax.data.text_data import Columns, read_examples, read_pairs, read_prompt_rows
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.learner.imitation import imitation_losses
from rlhf_jax.models.callables import policy, reward_model
from rlhf_jax.recipes import reward_model as reward_stage
from rlhf_jax.recipes import sft as sft_stage
from rlhf_jax.recipes.held_out import pass_rates
from rlhf_jax.recipes.networks import check_fits, read_network
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch, collate, encode_rows
from rlhf_jax.recipes.responses import ResponseEvaluator, make_sampler
from rlhf_jax.recipes.scorer import probe
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.recipes.splits import read_reported
from rlhf_jax.rewards.functions import RewardWorkers
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.progress import heading, say


def policy_figures(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    """Samples responses to the prompts of a file and returns metrics.

    Raises:
        ValueError: for invalid input, before anything is compiled.
        RewardFunctionError: if a reward function fails.
    """
    assert config.model is not None  # validated
    tokenization = Tokenization.load(config.model)
    batch = _read(config, path, tokenization)
    if not config.reward:
        return _measure(config, tokenization, batch, mesh, None)
    with RewardWorkers(
        config.reward,
        processes=2,
        time_limit=config.reward_time_limit,
        memory_limit=config.reward_memory_limit,
    ) as workers:
        probe(workers, batch.take(range(min(config.samples + 1, len(batch.rows)))))
        return _measure(config, tokenization, batch, mesh, workers)


def report_dropped(path: str, count: int) -> None:
    """Prints how many rows were too long."""
    if count:
        heading(f"{path}: {count} rows longer than max-tokens dropped")


def _read(config: EvaluateConfig, path: str, tokenization: Tokenization) -> PromptBatch:
    """Every prompt, repeated once per response."""
    read = partial(
        read_prompt_rows,
        columns=Columns(prompt=config.prompt_column),
        keep=(config.reward_columns or None) if config.reward else (),
        render_chat=tokenization.render,
    )
    rows = read_reported(path, read, quiet=False)[: config.limit]
    encoded, pairs = encode_rows(
        rows, tokenization=tokenization, max_prompt_tokens=config.max_tokens
    )
    report_dropped(path, encoded.dropped)
    batch = collate(pairs, width=encoded.width, pad_id=tokenization.pad_id)
    return batch.repeat(config.samples)


def _measure(
    config: EvaluateConfig,
    tokenization: Tokenization,
    batch: PromptBatch,
    mesh: Mesh,
    workers: RewardWorkers | None,
) -> dict[str, float]:
    width = batch.prompts.tokens.shape[1]
    models, params = _load(config, tokenization, prompt_width=width)
    evaluator = ResponseEvaluator(
        make_sampler(
            models.policy,
            max_new_tokens=config.max_new_tokens,
            stop_ids=tokenization.stop_ids(config.stop),
            temperature=config.temperature,
            pad_id=tokenization.pad_id,
        ),
        policy=models.policy,
        score_fn=models.score_fn,
        temperature=config.temperature,
        batch_size=min(config.batch_size, len(batch.rows)),
        mesh=mesh,
    )
    answers = evaluator.answers(
        seed_key(config.seed),
        params,
        batch.prompts,
        reference=models.reference,
        reward=models.reward,
    )
    figures = answers.metrics()
    if workers is not None:
        found = workers.score(batch.texts, answers.texts(tokenization), batch.columns)
        for spec, scores in zip(workers.specs, found.by_function, strict=True):
            figures[f"reward/{function_name(spec)}"] = float(np.mean(scores))
        if config.pass_score is not None:
            passed = found.by_function[0] >= config.pass_score
            figures |= pass_rates(passed.reshape(-1, config.samples))
    named = {f"prompts/{name}": value for name, value in figures.items()}
    return {"prompts": len(batch.rows) // config.samples} | named


def _load(
    config: EvaluateConfig, tokenization: Tokenization, *, prompt_width: int
) -> tuple[PolicyModels, Params]:
    """The policy, and the reference and reward model, if any."""
    assert config.model is not None  # validated
    module, params = read_network(config.model, head="lm", dtype=config.dtype)
    needed = prompt_width + config.max_new_tokens
    why = "prompt + max-new-tokens"
    check_fits(module.config, tokenization, needed=needed, name="model", why=why)
    reference = reward = score_fn = None
    if config.reference is not None:
        other = Tokenization.load(config.reference)
        tokenization.check_same_as(other, "reference", config.reference)
        reference_module, reference = read_network(
            config.reference, head="lm", dtype=config.dtype
        )
        if reference_module.config != module.config:
            raise ValueError(
                f"reference={config.reference!r}: its shape differs from that of "
                f"model={config.model!r}; both run in one program"
            )
    if config.reward_model is not None:
        other = Tokenization.load(config.reward_model)
        tokenization.check_same_as(other, "reward-model", config.reward_model)
        reward_module, reward = read_network(
            config.reward_model, head="reward", dtype=config.dtype
        )
        check_fits(
            reward_module.config,
            tokenization,
            needed=needed,
            name="reward-model",
            why=why,
        )
        score_fn = reward_model(reward_module)
    models = PolicyModels(
        module=module,
        policy=policy(module),
        score_fn=score_fn,
        reference=reference,
        reward=reward,
    )
    return models, params


def run(config: EvaluateConfig) -> dict[str, float]:
    """Evaluates on the given data; prints and returns the metrics.

    Raises:
        ValueError: for invalid input, before anything is compiled.
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
        say(f"{name:>{width}}  {value:.6g}")
    if config.output is not None:
        write_atomic(Path(config.output), json.dumps(figures, indent=2) + "\n")
    return figures


def _texts(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    assert config.model is not None  # validated
    tokenization = Tokenization.load(config.model)
    columns = Columns(prompt=config.prompt_column, completion=config.completion_column)
    read = partial(read_examples, columns=columns, render_chat=tokenization.render)
    encoded = encode_examples(
        read_reported(path, read, quiet=False)[: config.limit],
        tokenization.encoder,
        max_tokens=config.max_tokens,
    )
    report_dropped(path, encoded.dropped)
    module, params = read_network(config.model, head="lm", dtype=config.dtype)
    check_fits(
        module.config,
        tokenization,
        needed=encoded.width,
        name="model",
        why="max-tokens",
    )
    evaluate = sft_stage.make_evaluation(
        jax.jit(imitation_losses(policy(module).token_logprobs)),
        pad_examples(encoded.rows, width=encoded.width, pad_id=tokenization.pad_id),
        batch_size=min(config.batch_size, len(encoded.rows)),
        mesh=mesh,
    )
    return {"texts": len(encoded.rows)} | _named("texts", evaluate(params))


def _pairs(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    assert config.reward_model is not None  # validated
    tokenization = Tokenization.load(config.reward_model)
    read = partial(
        read_pairs,
        render_chat=tokenization.render,
        on_unusable=config.unusable_pairs,
    )
    encoded = encode_pairs(
        read_reported(path, read, quiet=False)[: config.limit],
        tokenization.encoder,
        max_tokens=config.max_tokens,
    )
    report_dropped(path, encoded.dropped)
    module, params = read_network(
        config.reward_model, head="reward", dtype=config.dtype
    )
    check_fits(
        module.config,
        tokenization,
        needed=encoded.width,
        name="reward-model",
        why="max-tokens",
    )
    evaluate = reward_stage.make_evaluation(
        reward_model(module),
        pad_pairs(encoded.rows, width=encoded.width, pad_id=tokenization.pad_id),
        batch_size=min(config.batch_size, len(encoded.rows)),
        mesh=mesh,
    )
    return {"pairs": len(encoded.rows)} | _named("pairs", evaluate(params))


def _named(group: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{name.removeprefix('eval/')}": v for name, v in figures.items()}

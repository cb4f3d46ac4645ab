"""Held-out figures of a policy: rewards, pass rates, KL, length, stop rate."""

from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.types import Params
from rlhf_jax.models.callables import policy, reward_model
from rlhf_jax.recipes.answers import Examiner, make_sampler
from rlhf_jax.recipes.held_out import pass_rates
from rlhf_jax.recipes.language import Language
from rlhf_jax.recipes.networks import check_fits, read_network
from rlhf_jax.recipes.policy_models import PolicyModels, check_language
from rlhf_jax.recipes.prompt_batches import PromptBatch, collate, encode_rows
from rlhf_jax.recipes.rewards import probe
from rlhf_jax.recipes.texts import read_reported
from rlhf_jax.recipes.tool_configs import EvaluateConfig
from rlhf_jax.runtime.progress import heading
from rlhf_jax.runtime.reward_functions import RewardWorkers, function_name
from rlhf_jax.runtime.text_data import Columns, read_prompt_rows


def policy_figures(config: EvaluateConfig, path: str, mesh: Mesh) -> dict[str, float]:
    """Answers the prompts of a file and measures the answers.

    Raises:
        ValueError: on bad input, before anything is compiled.
        RewardFunctionError: where a reward function fails.
    """
    assert config.model is not None  # validated
    language = Language.load(config.model)
    batch = _read(config, path, language)
    if not config.reward:
        return _measure(config, language, batch, mesh, None)
    with RewardWorkers(
        config.reward, processes=2, time_limit=config.reward_time_limit
    ) as workers:
        probe(workers, batch.take(range(min(config.samples + 1, len(batch.rows)))))
        return _measure(config, language, batch, mesh, workers)


def report_dropped(path: str, count: int) -> None:
    """Says how many rows were too long."""
    if count:
        heading(f"{path}: {count} rows longer than max-tokens left out")


def _read(config: EvaluateConfig, path: str, language: Language) -> PromptBatch:
    """Every prompt, as many times as it is answered."""
    read = partial(
        read_prompt_rows,
        columns=Columns(prompt=config.prompt_column),
        keep=(config.reward_columns or None) if config.reward else (),
        render_chat=language.render,
    )
    rows = read_reported(path, read, quiet=False)[: config.limit]
    encoded, pairs = encode_rows(
        rows, language=language, max_prompt_tokens=config.max_tokens
    )
    report_dropped(path, encoded.dropped)
    batch = collate(pairs, width=encoded.width, pad_id=language.pad_id)
    return batch.repeat(config.samples)


def _measure(
    config: EvaluateConfig,
    language: Language,
    batch: PromptBatch,
    mesh: Mesh,
    workers: RewardWorkers | None,
) -> dict[str, float]:
    width = batch.prompts.tokens.shape[1]
    models, params = _load(config, language, prompt_width=width)
    examiner = Examiner(
        make_sampler(
            models.policy,
            max_new_tokens=config.max_new_tokens,
            stop_ids=language.stop_ids(config.stop),
            temperature=config.temperature,
            pad_id=language.pad_id,
        ),
        policy=models.policy,
        score_fn=models.score_fn,
        temperature=config.temperature,
        batch_size=min(config.batch_size, len(batch.rows)),
        mesh=mesh,
    )
    answers = examiner.answers(
        jax.random.key(config.seed),
        params,
        batch.prompts,
        reference=models.reference,
        reward=models.reward,
    )
    figures = answers.metrics()
    if workers is not None:
        found = workers.score(batch.texts, answers.texts(language), batch.columns)
        for spec, scores in zip(workers.specs, found.by_function, strict=True):
            figures[f"reward/{function_name(spec)}"] = float(np.mean(scores))
        if config.pass_score is not None:
            passed = found.by_function[0] >= config.pass_score
            figures |= pass_rates(passed.reshape(-1, config.samples))
    named = {f"prompts/{name}": value for name, value in figures.items()}
    return {"prompts": len(batch.rows) // config.samples} | named


def _load(
    config: EvaluateConfig, language: Language, *, prompt_width: int
) -> tuple[PolicyModels, Params]:
    """The policy, and the reference and reward model where there are some."""
    assert config.model is not None  # validated
    module, params = read_network(config.model, head="lm", dtype=config.dtype)
    needed = prompt_width + config.max_new_tokens
    why = "prompt + max-new-tokens"
    check_fits(module, language, needed=needed, name="model", why=why)
    reference = reward = score_fn = None
    if config.reference is not None:
        check_language(language, "reference", config.reference)
        reference_module, reference = read_network(
            config.reference, head="lm", dtype=config.dtype
        )
        if reference_module.config != module.config:
            raise ValueError(
                f"reference={config.reference!r}: its shape differs from that of "
                f"model={config.model!r}; the two run through one program"
            )
    if config.reward_model is not None:
        check_language(language, "reward-model", config.reward_model)
        reward_module, reward = read_network(
            config.reward_model, head="reward", dtype=config.dtype
        )
        check_fits(reward_module, language, needed=needed, name="reward-model", why=why)
        score_fn = reward_model(reward_module)
    models = PolicyModels(
        module=module,
        policy=policy(module),
        score_fn=score_fn,
        reference=reference,
        reward=reward,
    )
    return models, params

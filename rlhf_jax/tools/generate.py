"""Responses of a model to prompts, printed or written to a file."""

import json
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.algo.types import Prompts
from rlhf_jax.config.tools import GenerateConfig
from rlhf_jax.data.batches import pad_prompts
from rlhf_jax.data.encoding import encode_prompts
from rlhf_jax.data.text_data import Columns, read_prompts
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.models.callables import policy
from rlhf_jax.recipes.networks import check_fits, read_network
from rlhf_jax.recipes.responses import ResponseEvaluator, make_sampler
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.progress import heading, say


def run(config: GenerateConfig) -> list[dict[str, Any]]:
    """Samples `config.samples` responses per prompt; returns the rows it writes.

    Raises:
        ValueError: for invalid input, before anything is compiled.
    """
    config.validate()
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    rows = answer(config)
    _show(config, rows)
    return rows


def answer(config: GenerateConfig, *, distinct: bool = False) -> list[dict[str, Any]]:
    """A row per response, with `prompt`, `response` and its number, `sample`.

    With `distinct`, repeated prompts of the data are used once.

    Raises:
        ValueError: for invalid input, before anything is compiled.
    """
    mesh = make_mesh()
    tokenization = Tokenization.load(config.model)
    asked = _prompts(config, tokenization)
    if distinct:
        asked = list(dict.fromkeys(asked))
    texts = [_in_chat(config, prompt, tokenization) for prompt in asked]
    module, params = read_network(config.model, head="lm", dtype=config.dtype)
    longest = module.config.max_positions - config.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max-new-tokens={config.max_new_tokens}: the model supports at most "
            f"{module.config.max_positions} tokens, which leaves no room for a prompt"
        )
    encoded = encode_prompts(
        texts,
        tokenization.encoder,
        max_prompt_tokens=longest,
        overlong="fail",
    )
    check_fits(
        module.config,
        tokenization,
        needed=max(len(row) for row in encoded.rows) + config.max_new_tokens,
        name="the model",
        why="prompt and max-new-tokens",
    )
    batch_size = min(config.batch_size, len(texts))
    callables = policy(module)
    evaluator = ResponseEvaluator(
        make_sampler(
            callables,
            max_new_tokens=config.max_new_tokens,
            stop_ids=tokenization.stop_ids(config.stop),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            pad_id=tokenization.pad_id,
        ),
        policy=callables,
        score_fn=None,
        temperature=config.temperature,
        batch_size=batch_size,
        mesh=mesh,
    )
    prompts: Prompts = pad_prompts(
        encoded.rows, width=encoded.width, pad_id=tokenization.pad_id
    )

    key = seed_key(config.seed)
    rows = []
    for number in range(config.samples):
        answers = evaluator.answers(jax.random.fold_in(key, number), params, prompts)
        pairs = zip(asked, answers.texts(tokenization), strict=True)
        rows += [{"prompt": p, "response": r, "sample": number} for p, r in pairs]
    return rows


def _prompts(config: GenerateConfig, tokenization: Tokenization) -> list[str]:
    if config.data is None:
        return list(config.prompt)
    columns = Columns(prompt=config.prompt_column)
    found = read_prompts(config.data, columns=columns, render_chat=tokenization.render)
    return found.rows[: config.limit]


def _in_chat(config: GenerateConfig, prompt: str, tokenization: Tokenization) -> str:
    """The model's input: the prompt, or a conversation that ends with it."""
    if not config.chat:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    try:
        return tokenization.render(messages, True)
    except ValueError as error:
        raise ValueError(f"prompt={prompt!r}: {error}") from None


def _show(config: GenerateConfig, rows: list[dict[str, Any]]) -> None:
    if config.output is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomic(Path(config.output), "".join(lines))
        heading(f"{len(rows)} responses written to {config.output}")
        return
    for row in rows:
        heading(row["prompt"])
        say(f"{row['response']}\n")

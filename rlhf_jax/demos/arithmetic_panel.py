"""Evaluates models on problems: accuracy, length, form."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.batches import pad_prompts
from rlhf_jax.data.encoding import encode_prompts
from rlhf_jax.data.text_data import PromptRow, read_prompt_rows
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.callables import policy
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.recipes.held_out import pass_rates
from rlhf_jax.recipes.responses import ResponseEvaluator, Responses, make_sampler
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.tasks.verifiable import exact_answer, reasoning_format

SAMPLES = 4  # responses per problem
BATCH_SIZE = 256
SEED = 7  # sampling seed, the same for every model


class ArithmeticPanel:
    """Evaluates models with one architecture and tokenizer on the same problems.

    Args:
        model: Hugging Face directory of one of them.
        max_prompt_tokens: maximum problem length.
        max_new_tokens: maximum response length.
    """

    def __init__(self, model: Path, *, max_prompt_tokens: int, max_new_tokens: int):
        self._tokenization = Tokenization.load(str(model))
        module, _ = load_pretrained(model)
        self._width = max_prompt_tokens
        callables = policy(module)
        sampled, likeliest = (
            ResponseEvaluator(
                make_sampler(
                    callables,
                    max_new_tokens=max_new_tokens,
                    stop_ids=self._tokenization.stop_ids(()),
                    pad_id=self._tokenization.pad_id,
                    temperature=temperature,
                ),
                policy=callables,
                score_fn=None,
                temperature=1.0,
                batch_size=BATCH_SIZE,
                mesh=make_mesh(),
            )
            for temperature in (1, 0)
        )
        self._sampled, self._likeliest = sampled, likeliest

    def row(
        self, name: str, model: Path, held_out: Path, harder: Path | None, limit: int
    ) -> dict[str, Any]:
        """Results on the first problems of two files: shares, and tokens."""
        _, params = load_pretrained(model)
        rows = read_prompt_rows(held_out).rows[:limit]
        right, form, answers = self._judge(self._sampled, params, rows, SAMPLES)
        greedy, _, _ = self._judge(self._likeliest, params, rows, 1)
        found: dict[str, Any] = {
            "pass@1": right.mean(),
            f"pass@{SAMPLES}": pass_rates(right > 0)[f"pass_at_{SAMPLES}"],
            "greedy": greedy.mean(),
        }
        if harder is not None:
            rows = read_prompt_rows(harder).rows[:limit]
            right, _, _ = self._judge(self._sampled, params, rows, SAMPLES)
            found["harder pass@1"] = right.mean()
        found["form kept"] = form.mean()
        found["length (tokens)"] = answers.metrics()["length_mean"]
        found["stop rate"] = answers.metrics()["stop_rate"]
        return {"policy": name} | {key: round(float(v), 4) for key, v in found.items()}

    def _judge(
        self,
        evaluator: ResponseEvaluator,
        params: Any,
        rows: list[PromptRow],
        samples: int,
    ) -> tuple[np.ndarray, np.ndarray, Responses]:
        """Accuracy and form of `samples` responses to each problem, `[N, samples]`."""
        rows = [row for row in rows for _ in range(samples)]
        prompts = [row.prompt for row in rows]
        encoded = encode_prompts(
            prompts,
            self._tokenization.encoder,
            max_prompt_tokens=self._width,
            overlong="fail",
        )
        answers = evaluator.answers(
            jax.random.key(SEED),
            params,
            pad_prompts(
                encoded.rows, width=self._width, pad_id=self._tokenization.pad_id
            ),
        )
        texts = answers.texts(self._tokenization)
        columns = {"answer": [row.columns["answer"] for row in rows]}
        right, form = (
            np.reshape(judge(prompts, texts, columns), (-1, samples))
            for judge in (exact_answer, reasoning_format)
        )
        return right, form, answers

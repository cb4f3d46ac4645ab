"""Evaluation of a policy on held-out prompts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.best_of_n import pass_at_k
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch
from rlhf_jax.recipes.responses import ResponseEvaluator, Responses, Sampler
from rlhf_jax.recipes.scorer import HeldOutRewards, Scorer
from rlhf_jax.run.session import Session

NUM_LOGGED_SAMPLES = 8


def pass_rates(passed: np.ndarray) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … up to n; `passed` is `[N, n]` bool, by prompt."""
    num_samples = passed.shape[1]
    num_correct = jnp.asarray(passed.sum(axis=1))
    return {
        f"pass_at_{k}": float(
            jnp.mean(pass_at_k(num_correct, num_samples=num_samples, k=k))
        )
        for k in (2**power for power in range(num_samples.bit_length()))
    }


class HeldOut:
    """Samples responses to held-out prompts, logs some, and returns metrics.

    Args:
        config: configuration of the run.
        batch: the prompts.
        models: policy, reference and reward model.
        sample: samples the responses.
        scorer: scorer of the run.
        tokenization: decodes the responses.
        mesh: device mesh.
        key: sampling key; the step is folded in.
    """

    def __init__(
        self,
        config: PPOConfig | GRPOConfig,
        batch: PromptBatch,
        *,
        models: PolicyModels,
        sample: Sampler,
        scorer: Scorer,
        tokenization: Tokenization,
        mesh: Mesh,
        key: Array,
    ):
        self._config = config
        self._batch = batch.repeat(config.eval_samples)
        self._models = models
        self._scorer = scorer
        self._tokenization = tokenization
        self._key = key
        self._evaluator = ResponseEvaluator(
            sample,
            policy=models.policy,
            score_fn=models.score_fn,
            temperature=config.temperature,
            batch_size=config.batch_size,
            mesh=mesh,
        )

    def __call__(self, session: Session, step: int, actor: Params) -> dict[str, float]:
        """Metrics `eval/…` after a step, for the policy's trainable parameters."""
        answers = self._evaluator.answers(
            jax.random.fold_in(self._key, step),
            self._models.actor(actor),
            self._batch.prompts,
            reference=self._models.reference,
            reward=self._models.reward,
        )
        texts = answers.texts(self._tokenization)
        rewards = self._scorer.of_answers(answers, texts, self._batch)
        self._log_samples(session, step, answers, texts, rewards)
        metrics = answers.metrics()
        metrics["score_mean"] = float(np.mean(rewards.scores))
        metrics["score_std"] = float(np.std(rewards.scores))
        for name, row in rewards.by_function.items():
            metrics[f"reward/{name}"] = float(np.mean(row))
        if rewards.failures is not None:
            metrics["failures"] = float(rewards.failures)
        metrics |= self._pass_rates(rewards.by_function)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _pass_rates(self, by_function: dict[str, np.ndarray]) -> dict[str, float]:
        """Pass rates by the first function, if there is a threshold."""
        threshold = self._config.eval_pass
        if threshold is None or not by_function:
            return {}
        passed = next(iter(by_function.values())) >= threshold
        return pass_rates(passed.reshape(-1, self._config.eval_samples))

    def _log_samples(
        self,
        session: Session,
        step: int,
        answers: Responses,
        texts: list[str],
        rewards: HeldOutRewards,
    ) -> None:
        """Logs the first response to each of the first prompts."""
        columns = {
            "response": texts,
            "score": rewards.scores,
            **rewards.by_function,
        }
        if answers.kl is not None:
            columns["kl"] = answers.kl
        first = range(0, len(texts), self._config.eval_samples)[:NUM_LOGGED_SAMPLES]
        prompts = self._tokenization.decode_prompts(self._batch.take(first).prompts)
        session.log_samples(
            step,
            [
                {"prompt": prompt} | {name: x[i] for name, x in columns.items()}
                for prompt, i in zip(prompts, first, strict=True)
            ],
        )

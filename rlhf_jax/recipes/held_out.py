"""What a policy does on held-out prompts, and which policy that says to keep."""

import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.algo.best_of_n import pass_at_k
from rlhf_jax.algo.types import Array, Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.recipes.answers import Answers, Examiner, Sampler
from rlhf_jax.recipes.policy_models import PolicyModels
from rlhf_jax.recipes.prompt_batches import PromptBatch
from rlhf_jax.recipes.scorer import HeldOutRewards, Judge
from rlhf_jax.run.run_directory import write_atomic
from rlhf_jax.run.session import Session

NUM_LOGGED_SAMPLES = 8
BEST_NOTE = "best.json"  # in the run directory: step and value of the policy kept


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
    """Answers held-out prompts, logs a few of the answers, returns their metrics.

    Args:
        config: of the run.
        batch: the prompts.
        models: policy, reference and reward model.
        sample: draws the answers.
        judge: of the run, entered.
        tokenization: to read the answers with.
        mesh: where to compute.
        key: root of the sampling; every step folds its number in.
    """

    def __init__(
        self,
        config: PPOConfig | GRPOConfig,
        batch: PromptBatch,
        *,
        models: PolicyModels,
        sample: Sampler,
        judge: Judge,
        tokenization: Tokenization,
        mesh: Mesh,
        key: Array,
    ):
        self._config = config
        self._batch = batch.repeat(config.eval_samples)
        self._models = models
        self._judge = judge
        self._tokenization = tokenization
        self._key = key
        self._examiner = Examiner(
            sample,
            policy=models.policy,
            score_fn=models.score_fn,
            temperature=config.temperature,
            batch_size=config.batch_size,
            mesh=mesh,
        )

    def __call__(self, session: Session, step: int, actor: Params) -> dict[str, float]:
        """Metrics after a step, of what is trained of the policy; `eval/…`."""
        answers = self._examiner.answers(
            jax.random.fold_in(self._key, step),
            self._models.actor(actor),
            self._batch.prompts,
            reference=self._models.reference,
            reward=self._models.reward,
        )
        texts = answers.texts(self._tokenization)
        rewards = self._judge.of_answers(answers, texts, self._batch)
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
        """By the first function, where the run has a threshold for it."""
        threshold = self._config.eval_pass
        if threshold is None or not by_function:
            return {}
        passed = next(iter(by_function.values())) >= threshold
        return pass_rates(passed.reshape(-1, self._config.eval_samples))

    def _log_samples(
        self,
        session: Session,
        step: int,
        answers: Answers,
        texts: list[str],
        rewards: HeldOutRewards,
    ) -> None:
        """The first answer to each of the first prompts."""
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


class PolicyKeeper:
    """Writes the policy that a run is for: its last, or its best on held-out prompts.

    With `early_stop`, every policy that is the best so far is written at once, and the
    run is done when patience runs out. A resumed run knows what was seen before; where
    an interrupted one had got further and written a policy from there, which is none of
    this run, the policy of the checkpoint is the first of a new count (`start`), or the
    next that is evaluated.

    Args:
        config: of the run.
        session: entered.
        save: `save(trained)` writes a policy.
    """

    def __init__(
        self,
        config: PPOConfig | GRPOConfig,
        session: Session,
        save: Callable[..., None],
    ):
        self._metric = config.early_stop
        self._patience = config.early_stop_patience
        self._note = session.run.path / BEST_NOTE
        self._save = save
        self._best = -math.inf
        self._waited = 0
        if self._metric is not None and self._saved_step() <= session.start_step:
            for value in session.history(self._metric):
                self._is_best(value)

    def see(self, step: int, metrics: dict[str, float], actor: Params) -> None:
        """Takes note of an evaluation of `actor` after `step`."""
        if self._metric is not None and self._is_best(metrics[self._metric]):
            # The note first: killed in between, the run will not trust what it finds.
            note = {"step": step, self._metric: metrics[self._metric]}
            write_atomic(self._note, json.dumps(note) + "\n")
            self._save(actor)

    def start(self, session: Session, actor: Params) -> None:
        """Lets the actor of the checkpoint be the best, if a later one was written.

        A run that went back is none that has seen that later policy.
        """
        if self._metric is None or self._saved_step() <= session.start_step:
            return
        values = session.history(self._metric)
        if values and session.is_eval_step(session.start_step):
            self.see(session.start_step, {self._metric: values[-1]}, actor)

    @property
    def is_done(self) -> bool:
        """Whether patience has run out."""
        return self._metric is not None and self._waited >= self._patience

    def finish(self, actor: Params) -> None:
        """Writes the last policy, unless the best one is written already."""
        if self._metric is None:
            self._save(actor)

    def _saved_step(self) -> int:
        if not self._note.exists():
            return 0
        return json.loads(self._note.read_text("utf-8"))["step"]

    def _is_best(self, value: float) -> bool:
        better = value > self._best
        self._best = max(self._best, value)
        self._waited = 0 if better else self._waited + 1
        return better

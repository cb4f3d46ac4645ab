"""Which policy a run saves: its last, or its best on held-out prompts."""

import json
import math
from collections.abc import Callable

from rlhf_jax.algo.types import Params
from rlhf_jax.config.grpo import GRPOConfig
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.typed_fields import integer
from rlhf_jax.run.session import Session

BEST_NOTE = "best.json"  # in the run directory: step and metric of the saved policy


class PolicyKeeper:
    """Saves the last policy of a run, or the best on held-out prompts.

    With `early_stop`, each new best policy is saved immediately, and the run ends when
    patience runs out. A resumed run reads the earlier evaluations. If a later policy
    was saved after the checkpoint, it is not part of the resumed run, and counting
    restarts from the checkpoint's policy (`start`) or the next evaluated one.

    Args:
        config: configuration of the run.
        session: an entered session.
        save: `save(trained)` saves a policy.
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
        """Records an evaluation of `actor` after `step`."""
        if self._metric is not None and self._is_best(metrics[self._metric]):
            # The note first: if killed in between, the run ignores the saved policy.
            note = {"step": step, self._metric: metrics[self._metric]}
            write_atomic(self._note, json.dumps(note) + "\n")
            self._save(actor)

    def start(self, session: Session, actor: Params) -> None:
        """Makes the checkpoint's actor the best so far if a later one was saved.

        The later policy is not part of the resumed run.
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
        """Saves the last policy, unless the best one is saved already."""
        if self._metric is None:
            self._save(actor)

    def _saved_step(self) -> int:
        if not self._note.exists():
            return 0
        return integer(read_object(self._note), "step", least=0)

    def _is_best(self, value: float) -> bool:
        better = value > self._best
        self._best = max(self._best, value)
        self._waited = 0 if better else self._waited + 1
        return better

"""Reward models as a reward function of texts, for evaluation only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.scores import EnsembleScore, combine_scores
from rlhf_jax.algo.types import Demonstrations
from rlhf_jax.data.batches import pad_examples
from rlhf_jax.data.encoding import encode_examples
from rlhf_jax.data.row_forms import Example
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.callables import reward_model
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.run.devices import make_mesh, map_batches

MAX_TOKENS = 1 << 30  # never truncates: the policy could handle this length


class RewardJudge:
    """K reward models with the same architecture and tokenizer, called with texts.

    To use it as a reward function, put it in a file,

        ensemble = RewardJudge(["runs/rm-1/model", "runs/rm-2/model"], how="worst")

    and name it `judge.py:ensemble`. The models are loaded at the first call. Responses
    are scored as full texts with EOS, even if truncated, and are re-tokenized, so
    unusual tokenizations by the policy have no effect.

    Args:
        paths: Hugging Face directories of the reward models.
        how: see `combine_scores`.
        penalty: λ of mean-minus-std.
        batch_size: responses per batch.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        how: EnsembleScore = "mean",
        penalty: float = 1.0,
        batch_size: int = 64,
    ):
        if not paths:
            raise ValueError("paths=[]: name at least one reward model")
        self._paths = [Path(path) for path in paths]
        self._how: EnsembleScore = how
        self._penalty = penalty
        self._batch_size = batch_size
        self._loaded: tuple[Any, list[Any], Tokenization] | None = None

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Any],
    ) -> list[float]:
        """One score per response; `columns` are ignored."""
        scores = jnp.asarray(self.scores(prompts, responses))
        combined = combine_scores(scores, how=self._how, penalty=self._penalty)
        return np.asarray(combined).tolist()

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """`[K, B]` float32, the score of each model for each of B ≥ 1 responses."""
        if self._loaded is None:
            self._loaded = self._load()
        score_fn, models, tokenization = self._loaded
        encoded = encode_examples(
            [Example(*pair) for pair in zip(prompts, responses, strict=True)],
            tokenization.encoder,
            max_tokens=MAX_TOKENS,
            overlong="fail",
        )
        rows = pad_examples(
            encoded.rows, width=encoded.width, pad_id=tokenization.pad_id
        )

        def score(_: int, batch: Demonstrations) -> list[jax.Array]:
            return [score_fn(params, batch.tokens, batch.mask) for params in models]

        return np.stack(
            map_batches(score, rows, batch_size=self._batch_size, mesh=make_mesh())
        )

    def _load(self) -> tuple[Any, list[Any], Tokenization]:
        loaded = [load_pretrained(path, head="reward") for path in self._paths]
        tokenization = Tokenization.load(str(self._paths[0]))
        module = loaded[0][0]
        for path, (other, _) in zip(self._paths, loaded, strict=True):
            tokenization.check_same_as(Tokenization.load(str(path)), "paths", str(path))
            if other.config != module.config:
                raise ValueError(
                    f"paths={str(path)!r}: its architecture differs from that of "
                    f"{str(self._paths[0])!r}; give models of one architecture"
                )
        score_fn = jax.jit(reward_model(module))
        return score_fn, [params for _, params in loaded], tokenization

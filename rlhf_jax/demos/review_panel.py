"""Samples models on the review task and scores them by the true reward."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.algo.types import Params
from rlhf_jax.data.batches import pad_pairs, pad_prompts
from rlhf_jax.data.encoding import encode_pairs, encode_prompts
from rlhf_jax.data.text_data import PreferencePair
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.callables import policy, reward_model
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.recipes.responses import ResponseEvaluator, Responses, make_sampler
from rlhf_jax.recipes.reward_model import make_evaluation
from rlhf_jax.recipes.seeds import seed_key
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.tasks import reviews

NUM_PROMPTS = 256
BEST_OF = 8
MAX_PROMPT_TOKENS = 16
MAX_NEW_TOKENS = 39
MAX_POSITIONS = 96  # the longest text that is scored
BATCH_SIZE = 128


class ReviewPanel:
    """The SFT model as sampler and reference, and optionally a reward model.

    Args:
        model: Hugging Face directory of the SFT model.
        reward_path: of the reward model.
    """

    def __init__(self, model: Path, reward_path: Path | None = None):
        self.tokenization = Tokenization.load(str(model))
        module, self.reference = load_pretrained(model)
        self.score_fn = self.reward = None
        if reward_path is not None:
            reward_module, self.reward = load_pretrained(reward_path, head="reward")
            self.score_fn = reward_model(reward_module)
        callables = policy(module)
        self.mesh = make_mesh()
        self._evaluator = ResponseEvaluator(
            make_sampler(
                callables,
                max_new_tokens=MAX_NEW_TOKENS,
                stop_ids=self.tokenization.stop_ids(()),
                pad_id=self.tokenization.pad_id,
            ),
            policy=callables,
            score_fn=self.score_fn,
            temperature=1.0,
            batch_size=BATCH_SIZE,
            mesh=self.mesh,
        )

    def answers(
        self, prompts: Sequence[str], *, seed: int, params: Params | None = None
    ) -> tuple[list[str], Responses]:
        """One response per prompt, from the SFT model or from other parameters."""
        encoded = encode_prompts(
            prompts,
            self.tokenization.encoder,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            overlong="fail",
        )
        answers = self._evaluator.answers(
            seed_key(seed),
            self.reference if params is None else params,
            pad_prompts(
                encoded.rows, width=MAX_PROMPT_TOKENS, pad_id=self.tokenization.pad_id
            ),
            reference=self.reference,
            reward=self.reward,
        )
        return answers.texts(self.tokenization), answers

    def compare(self, trained: Path, *, seed: int) -> list[dict[str, Any]]:
        """One row each for SFT, best of 8 by the reward model, and a trained policy."""
        prompts = reviews.make_prompts(seed, NUM_PROMPTS, "heldout")
        _, params = load_pretrained(trained)
        draws = [self.answers(prompts, seed=seed + i) for i in range(BEST_OF)]
        ppo = self.answers(prompts, seed=seed + BEST_OF, params=params)

        scores = np.stack([np.asarray(answers.scores) for _, answers in draws])
        best = scores.argmax(axis=0)  # [N], index of the best sample
        chosen_texts = [draws[draw][0][i] for i, draw in enumerate(best)]
        chosen = jax.tree.map(
            lambda *rows: np.stack([rows[draw][i] for i, draw in enumerate(best)]),
            *[answers for _, answers in draws],
        )
        # Best of n has no token probabilities: use the bound of KL(best of n ‖
        # reference).
        bound = math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
        return [
            _row("SFT", prompts, *draws[0]),
            _row(f"best of {BEST_OF}", prompts, chosen_texts, chosen, kl=bound),
            _row("PPO", prompts, *ppo),
        ]

    def pair_accuracy(self, pairs: Sequence[PreferencePair]) -> float:
        """Share of pairs in which the reward model scores the chosen response
        higher."""
        assert self.score_fn is not None
        encoded = encode_pairs(
            pairs,
            self.tokenization.encoder,
            max_tokens=MAX_POSITIONS,
            overlong="fail",
        )
        evaluate = make_evaluation(
            self.score_fn,
            pad_pairs(
                encoded.rows, width=encoded.width, pad_id=self.tokenization.pad_id
            ),
            batch_size=BATCH_SIZE,
            mesh=self.mesh,
        )
        return evaluate(self.reward)["eval/accuracy"]


def _row(
    name: str,
    prompts: Sequence[str],
    texts: Sequence[str],
    answers: Responses,
    *,
    kl: float | None = None,
) -> dict[str, Any]:
    true = reviews.true_rewards(prompts, texts)
    figures = answers.metrics()
    row = {
        "true reward": float(np.mean(true)),
        "true reward std": float(np.std(true)),
        "proxy reward": figures["score_mean"],
        "KL to SFT (nats)": figures["kl_sequence"] if kl is None else kl,
        "length (tokens)": figures["length_mean"],
        "stop rate": figures["stop_rate"],
    }
    # Rounding noise would show as -1.9e-08; + 0.0 turns -0.0 into 0.0.
    return {"policy": name} | {key: round(v, 4) + 0.0 for key, v in row.items()}

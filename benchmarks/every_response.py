"""Every response of a small language as the arrays of one batch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algo.masking import response_mask
from rlhf_jax.algo.types import Array, Prompts, Rollout, ScoredRollout, record
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.tasks.enumerable import EnumerableTask


@record
class Language:
    """Every response, as arrays; N prefixes, K responses of up to T tokens."""

    tokens: Array  # [K, T] int32
    states: Array  # [K, T] int32, the prefix in which token t was chosen
    lengths: Array  # [K] int32
    truncated: Array  # [K] bool, no stop token
    scores: Array  # [K] float32
    text: Array  # [K] int32, the response of the task that the reward model reads
    ref_logits: Array  # [N, V] float32

    @property
    def mask(self) -> Array:
        """`[K, T]` bool, True on response tokens."""
        return jnp.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]

    @property
    def num_critic_states(self) -> int:
        """N + K."""
        return len(self.ref_logits) + len(self.tokens)

    @property
    def critic_states(self) -> Array:
        """`[K, T]` int32: as `states`, and N + k where response k is over."""
        over = len(self.ref_logits) + jnp.arange(len(self.tokens), dtype=jnp.int32)
        return jnp.where(self.mask, self.states, over[:, None])

    def logprobs(self, logits: Array) -> Array:
        """`[K, T]` float32."""
        return jax.nn.log_softmax(logits, axis=-1)[self.states, self.tokens]

    def probs(self, logits: Array) -> Array:
        """`[K]` float32, of whole responses."""
        logprobs = jnp.where(self.mask, self.logprobs(logits), 0.0)
        return jnp.exp(jnp.sum(logprobs, axis=1))


def language_of(task: EnumerableTask, method: PPOMethod) -> Language:
    """The task's responses; all of length T if the method samples on after a stop.

    What follows a stop token has random reference logits and changes no score.
    """
    if method.after_stop == "cut":
        return Language(
            tokens=jnp.asarray(task.responses.tokens),
            states=jnp.asarray(task.responses.states),
            lengths=jnp.asarray(task.responses.lengths),
            truncated=jnp.asarray(task.responses.truncated),
            scores=jnp.asarray(task.scores, jnp.float32),
            text=jnp.arange(len(task.scores), dtype=jnp.int32),
            ref_logits=jnp.asarray(task.ref_logits, jnp.float32),
        )
    steps, alphabet = task.max_steps, range(task.vocabulary_size)
    tokens = np.array(list(itertools.product(alphabet, repeat=steps)), np.int32)
    prefixes = [p for n in range(steps) for p in itertools.product(alphabet, repeat=n)]
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    states = [[index[tuple(row[:t])] for t in range(steps)] for row in tokens.tolist()]
    ref_logits = np.random.default_rng(0).standard_normal(
        (len(prefixes), len(alphabet))
    )
    ref_logits[[index[prefix] for prefix in task.prefixes]] = task.ref_logits

    read = np.asarray(response_mask(jnp.asarray(tokens), stop_ids=task.stop_token))
    answers = _texts(task.responses.tokens, task.responses.mask)
    text = np.array([answers.index(text) for text in _texts(tokens, read)])
    return Language(
        tokens=jnp.asarray(tokens),
        states=jnp.asarray(states, jnp.int32),
        lengths=jnp.full(len(tokens), steps, jnp.int32),
        truncated=jnp.asarray(task.responses.truncated[text]),
        scores=jnp.asarray(task.scores[text], jnp.float32),
        text=jnp.asarray(text, jnp.int32),
        ref_logits=jnp.asarray(ref_logits, jnp.float32),
    )


def _texts(tokens: np.ndarray, mask: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row[real]) for row, real in zip(tokens, mask, strict=True)]


def scored_rollout(language: Language, logits: Array, critic: Array) -> ScoredRollout:
    """Every response once; the critic is `[N + K]`, prefixes and ends of responses."""
    logprobs = language.logprobs(logits)
    ones = jnp.ones_like(language.lengths)
    rollout = Rollout(
        prompts=Prompts(tokens=ones[:, None], lengths=ones),
        responses=language.tokens,
        lengths=language.lengths,
        truncated=language.truncated,
        logprobs=logprobs,
    )
    return ScoredRollout(
        rollout=rollout,
        logprobs=logprobs,
        ref_logprobs=language.logprobs(language.ref_logits),
        values=critic[language.critic_states],
        scores=language.scores,
    )

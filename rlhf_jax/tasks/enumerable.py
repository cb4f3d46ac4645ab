"""A language small enough to enumerate, with exact results.

A response is sampled token by token until the stop token or a limit of T tokens. With a
few tokens and up to four steps every response y can be listed and scored, so that a
training run, or a gradient estimator, can be compared to the exact result. The
objective is that of RLHF, with β = `kl_coef`:

    J(π) = E_π[r(y)] − β · KL(π ‖ π_ref)
    π*(y) = π_ref(y) · exp(r(y) / β) / Z,    Z = Σ_y π_ref(y) · exp(r(y) / β)
    J(π*) = β · log Z

and, as a token-level MDP with actions a in states s (the prefixes of responses),

    r(s, a) = [s·a is a whole response] · r(s·a) − β · log(π(a|s) / π_ref(a|s))
    Q(s, a) = r(s, a) + V(s·a),    V(s) = Σ_a π(a|s) · Q(s, a),    J(π) = V(empty)

A policy is a table of finite logits `[N, V]`, one row per prefix; all computations are
in float64. N prefixes, K responses, V tokens.

References:
    Ziegler et al., 2019, arXiv:1909.08593, eq. 2; the optimum: Korbak et al., 2022,
    arXiv:2205.11275; the gradient: Sutton et al., 2000, policy gradient theorem.
"""

import dataclasses
import functools
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Responses:
    """Every response of a language; `tokens` and `states` are 0 past the end."""

    tokens: np.ndarray  # [K, T] int32, right-padded
    lengths: np.ndarray  # [K] int32, tokens through the stop token
    truncated: np.ndarray  # [K] bool, no stop token before the limit
    states: np.ndarray  # [K, T] int32, the prefix in which token t was chosen

    @property
    def mask(self) -> np.ndarray:
        """`[K, T]` bool, True on tokens up to and including the stop token."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EnumerableTask:
    """A language, a reference policy and a score for every response.

    Raises:
        ValueError: when a size, the stop token or the shape of an array is wrong.
    """

    vocabulary_size: int  # V
    max_steps: int  # T, maximum response length
    stop_token: int  # ends a response and is included in it
    ref_logits: np.ndarray  # [N, V] float64, the reference policy
    scores: np.ndarray  # [K] float64, r(y) in the order of `responses`

    def __post_init__(self):
        _check_sizes(self.vocabulary_size, self.max_steps, self.stop_token)
        tables = (len(self.prefixes), self.vocabulary_size)
        _check_shape("ref_logits", self.ref_logits, tables)
        _check_shape("scores", self.scores, self.responses.lengths.shape)

    @functools.cached_property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """The N states, shortest first: 0 … T − 1 tokens, none of them the stop."""
        return _prefixes(self.vocabulary_size, self.max_steps, self.stop_token)

    @functools.cached_property
    def responses(self) -> Responses:
        """The K responses: those that stop, ordered as `prefixes`, then the others."""
        return enumerate_responses(
            self.vocabulary_size, self.max_steps, self.stop_token
        )

    @functools.cached_property
    def transitions(self) -> np.ndarray:
        """`[N + 1, V]` int32: the state after a token; N after the end."""
        end = len(self.prefixes)
        index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        rows = [
            [index.get((*prefix, token), end) for token in range(self.vocabulary_size)]
            for prefix in self.prefixes
        ]
        return np.array([*rows, [end] * self.vocabulary_size], np.int32)

    @functools.cached_property
    def token_scores(self) -> np.ndarray:
        """`[N, V]`: r(y) on the token that completes y, 0 on all others."""
        last = self.responses.lengths - 1
        row = np.arange(len(last))
        table = np.zeros(self.ref_logits.shape)
        table[self.responses.states[row, last], self.responses.tokens[row, last]] = (
            self.scores
        )
        return table


def random_task(
    seed: int,
    *,
    vocabulary_size: int = 4,
    max_steps: int = 4,
    stop_token: int = 0,
    ref_scale: float = 0.5,
    score_scale: float = 1.0,
) -> EnumerableTask:
    """A task with normally distributed reference logits and scores.

    Args:
        seed: the same seed gives the same task.
        vocabulary_size: V, at least 2.
        max_steps: T, at least 1.
        stop_token: in `[0, V)`.
        ref_scale: standard deviation of the reference logits; 0 for uniform choices.
        score_scale: standard deviation of the scores.

    Raises:
        ValueError: when a size or the stop token is out of its range.
    """
    rng = np.random.default_rng(seed)
    sizes = (vocabulary_size, max_steps, stop_token)
    num_prefixes = len(_prefixes(*sizes))
    num_responses = len(enumerate_responses(*sizes).lengths)
    return EnumerableTask(
        vocabulary_size=vocabulary_size,
        max_steps=max_steps,
        stop_token=stop_token,
        ref_logits=ref_scale * rng.standard_normal((num_prefixes, vocabulary_size)),
        scores=score_scale * rng.standard_normal(num_responses),
    )


def enumerate_responses(
    vocabulary_size: int, max_steps: int, stop_token: int
) -> Responses:
    """All K = N + (V − 1)^T responses of a language.

    Raises:
        ValueError: when a size or the stop token is out of its range.
    """
    prefixes = _prefixes(vocabulary_size, max_steps, stop_token)
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    going_on = [token for token in range(vocabulary_size) if token != stop_token]
    stopped = [(*prefix, stop_token) for prefix in prefixes]
    truncated = list(itertools.product(going_on, repeat=max_steps))
    responses = stopped + truncated

    tokens = np.zeros((len(responses), max_steps), np.int32)
    states = np.zeros_like(tokens)
    for k, response in enumerate(responses):
        tokens[k, : len(response)] = response
        states[k, : len(response)] = [index[response[:t]] for t in range(len(response))]
    return Responses(
        tokens=tokens,
        lengths=np.array([len(response) for response in responses], np.int32),
        truncated=np.arange(len(responses)) >= len(stopped),
        states=states,
    )


def response_logprobs(task: EnumerableTask, logits: np.ndarray) -> np.ndarray:
    """`[K]`: log π(y) = Σ_t log π(y_t | y_<t), for the policy `logits` `[N, V]`."""
    responses = task.responses
    per_token = log_softmax(logits)[responses.states, responses.tokens]
    return np.where(responses.mask, per_token, 0.0).sum(axis=1)


def expected_score(task: EnumerableTask, logits: np.ndarray) -> float:
    """E_π[r(y)]."""
    return float(np.exp(response_logprobs(task, logits)) @ task.scores)


def kl_to_reference(task: EnumerableTask, logits: np.ndarray) -> float:
    """KL(π ‖ π_ref) of whole responses, in nats."""
    logprobs = response_logprobs(task, logits)
    log_ratio = logprobs - response_logprobs(task, task.ref_logits)
    return float(np.exp(logprobs) @ log_ratio)


def objective(task: EnumerableTask, logits: np.ndarray, *, kl_coef: float) -> float:
    """J(π) = E_π[r(y)] − β · KL(π ‖ π_ref), summed over all responses."""
    return expected_score(task, logits) - kl_coef * kl_to_reference(task, logits)


def optimal_objective(task: EnumerableTask, *, kl_coef: float) -> float:
    """J* = β · log Σ_y π_ref(y) · exp(r(y) / β), the maximum of J over policies.

    Raises:
        ValueError: when `kl_coef` is not positive.
    """
    return kl_coef * float(_logsumexp(_tilted(task, kl_coef)))


def optimal_response_logprobs(task: EnumerableTask, *, kl_coef: float) -> np.ndarray:
    """`[K]`: log π*(y) = log π_ref(y) + r(y) / β − log Z.

    Raises:
        ValueError: when `kl_coef` is not positive.
    """
    return log_softmax(_tilted(task, kl_coef))


def optimal_policy(task: EnumerableTask, *, kl_coef: float) -> np.ndarray:
    """`[N, V]`: π* per token, as log-probabilities, which are also logits.

        Q*(s, a) = [s·a is whole] · r(s·a) + V*(s·a)
        V*(s) = β · log Σ_a π_ref(a|s) · exp(Q*(s, a) / β)
        π*(a|s) = π_ref(a|s) · exp((Q*(s, a) − V*(s)) / β)

    Raises:
        ValueError: when `kl_coef` is not positive.
    """
    _check_kl_coef(kl_coef)
    ref_logprobs = log_softmax(task.ref_logits)
    action_values = task.token_scores
    for _ in range(task.max_steps - 1):  # each sweep settles one more level
        values = kl_coef * _logsumexp(ref_logprobs + action_values / kl_coef)
        action_values = task.token_scores + _after(task, values)
    return log_softmax(ref_logprobs + action_values / kl_coef)


def token_rewards(
    task: EnumerableTask, logits: np.ndarray, *, kl_coef: float
) -> np.ndarray:
    """`[N, V]`: r(s, a), the score at the end, minus β · log(π / π_ref) everywhere."""
    log_ratio = log_softmax(logits) - log_softmax(task.ref_logits)
    return task.token_scores - kl_coef * log_ratio


def action_values(
    task: EnumerableTask, logits: np.ndarray, *, kl_coef: float
) -> np.ndarray:
    """`[N, V]`: Q(s, a) = r(s, a) + V(s·a), under the policy itself."""
    policy = np.exp(log_softmax(logits))
    rewards = token_rewards(task, logits, kl_coef=kl_coef)
    values = rewards
    for _ in range(task.max_steps - 1):  # each sweep settles one more level
        values = rewards + _after(task, (policy * values).sum(axis=1))
    return values


def state_values(
    task: EnumerableTask, logits: np.ndarray, *, kl_coef: float
) -> np.ndarray:
    """`[N]`: V(s), the expected sum of `token_rewards` from s on; V(empty) = J(π)."""
    policy = np.exp(log_softmax(logits))
    return (policy * action_values(task, logits, kl_coef=kl_coef)).sum(axis=1)


def state_visits(task: EnumerableTask, logits: np.ndarray) -> np.ndarray:
    """`[N]`: d(s), the probability that a response passes through s."""
    responses = task.responses
    probs = np.exp(response_logprobs(task, logits))
    per_token = np.broadcast_to(probs[:, None], responses.mask.shape)
    return np.bincount(
        responses.states[responses.mask],
        weights=per_token[responses.mask],
        minlength=len(task.prefixes),
    )


def objective_gradient(
    task: EnumerableTask, logits: np.ndarray, *, kl_coef: float
) -> np.ndarray:
    """`[N, V]`: ∂J / ∂logits(s, a) = d(s) · π(a|s) · (Q(s, a) − V(s)).

    The policy gradient theorem for a softmax table. That r(s, a) depends on π itself
    adds −β · E[∇ log π(a|s)], which is 0.
    """
    policy = np.exp(log_softmax(logits))
    values = action_values(task, logits, kl_coef=kl_coef)
    advantages = values - (policy * values).sum(axis=1, keepdims=True)
    return state_visits(task, logits)[:, None] * policy * advantages


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64: `[…, V]` finite → `[…, V]`."""
    logits = np.asarray(logits, np.float64)
    return logits - _logsumexp(logits)[..., None]


def _logsumexp(x: np.ndarray) -> np.ndarray:
    largest = x.max(axis=-1)
    return largest + np.log(np.exp(x - largest[..., None]).sum(axis=-1))


def _after(task: EnumerableTask, values: np.ndarray) -> np.ndarray:
    """`[N]` → `[N, V]`: V of the state after a token, 0 once the response is over."""
    return np.append(values, 0.0)[task.transitions[:-1]]


def _tilted(task: EnumerableTask, kl_coef: float) -> np.ndarray:
    """`[K]`: log(π_ref(y) · exp(r(y) / β))."""
    _check_kl_coef(kl_coef)
    return response_logprobs(task, task.ref_logits) + task.scores / kl_coef


def _prefixes(
    vocabulary_size: int, max_steps: int, stop_token: int
) -> tuple[tuple[int, ...], ...]:
    _check_sizes(vocabulary_size, max_steps, stop_token)
    going_on = [token for token in range(vocabulary_size) if token != stop_token]
    return tuple(
        prefix
        for length in range(max_steps)
        for prefix in itertools.product(going_on, repeat=length)
    )


def _check_sizes(vocabulary_size: int, max_steps: int, stop_token: int) -> None:
    if vocabulary_size < 2:
        raise ValueError(f"vocabulary_size={vocabulary_size}: expected at least 2")
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: expected at least 1")
    if not 0 <= stop_token < vocabulary_size:
        raise ValueError(
            f"stop_token={stop_token}: expected a token, 0 to {vocabulary_size - 1}"
        )


def _check_shape(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}: expected {expected}")


def _check_kl_coef(kl_coef: float) -> None:
    if not kl_coef > 0:
        raise ValueError(f"kl_coef={kl_coef}: expected above 0; at 0 there is no π*")

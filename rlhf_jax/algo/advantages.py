"""Advantages and value targets over response tokens.

In every function masked tokens inside a row, such as tool output, are skipped, as if
they were removed from the row. The episode ends at the last real token, whether it
stopped there or was truncated, and the value after it is 0 unless `end_values` is
given.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.algo.masking import column_indices, last_token_index
from rlhf_jax.algo.types import Array, Scalar


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: Scalar = 1.0,
    lam: Scalar = 0.95,
    method: Literal["scan", "associative"] = "scan",
    gaps: Literal["carry", "zero"] = "carry",
    target_values: Array | None = None,
    end_values: Array | None = None,
) -> tuple[Array, Array]:
    """Generalized advantage estimates and value targets, one pair per token.

    With s_t = prompt + response[:t] and a_t = response[t], runs backwards over the
    real tokens t:

        δ_t = r_t + γ · V(s_{t+1}) − V(s_t)
        A_t = δ_t + γλ · A_{t+1}
        R_t = A_t + V(s_t) = r_t + γ · ((1 − λ) · V(s_{t+1}) + λ · R_{t+1})

    V = A = 0 after the last real token. A masked token inside a row passes A and V
    through unchanged. Advantages are not whitened here.

    With `target_values` V', such as those of a slow copy of the critic, V' replaces V
    in the last line, and A_t = R_t − V(s_t): at λ = 1, R does not depend on the
    critics. (Replacing V by V' in δ would leave their differences in A at every λ.)

    λ = 1 uses returns only: no bias from the critic, but the variance of all later
    tokens. λ = 0.95 (OpenAI-style PPO) discounts a final score by 0.95^k, almost to
    zero after 100 tokens: use 1, or `length_adaptive_lam`, for long responses. For
    separate λ for policy and critic, call it twice.

    Args:
        rewards: `[B, T]` float, r_t, the reward for token t.
        values: `[B, T]` float, V(s_t), the critic's estimate *before* token t.
        mask: `[B, T]` bool, True on response tokens through the first stop token;
            `include_end_state` of that if the score is after the last token.
        gamma: `[]`, discount per token, in [0, 1].
        lam: `[]`, or one per row, `[B]`: λ; 0 gives TD errors, 1 gives returns minus
            values.
        method: `"scan"` steps back through time and is faster on a CPU; `"associative"`
            takes log T parallel steps. They agree up to rounding.
        gaps: `"carry"` as described above; `"zero"` treats a masked token inside a row
            as a state with value 0 and no reward, where A decays by γλ (to reproduce
            OpenRLHF and slime).
        target_values: `[B, T]` float, V'(s_t); `values` by default.
        end_values: `[B]` float, V' after the last real token, to bootstrap truncated
            responses. 0 by default.

    Returns:
        `(advantages, returns)`, both `[B, T]` float32 and 0 where `mask` is False.
        Neither carries a gradient.

    Raises:
        ValueError: on an unknown method or `gaps`.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Schulman et al., 2016, arXiv:1506.02438, eq. 16; PPO, arXiv:1707.06347, eq. 11.
    """
    rewards, values = _check_and_mask(rewards, values, mask)
    gamma = _scalar(gamma)
    lam = jnp.asarray(lam, jnp.float32)
    chex.assert_rank(lam, {0, 1})
    if lam.ndim:
        chex.assert_shape(lam, (mask.shape[0],))
    lam_of_row = lam[:, None] if lam.ndim else lam[None, None]
    targets = values
    if target_values is not None:
        # γ · ((1 − λ) · V' + λ · (V + A)) is γ · bootstrap + γλ · A.
        _, targets = _check_and_mask(rewards, target_values, mask)
        targets = (1.0 - lam_of_row) * targets + lam_of_row * values
    end = jnp.zeros_like(values[:, 0])
    if end_values is not None:
        chex.assert_shape(end_values, end.shape)
        chex.assert_type(end_values, float)
        end = end_values.astype(jnp.float32)

    real = _steps(mask, gaps)
    if method == "scan":
        recursion = _gae_scan
    elif method == "associative":
        recursion = _gae_associative
    else:
        raise ValueError(f"method={method!r}: expected 'scan' or 'associative'")
    advantages = recursion(rewards, values, targets, end, real, gamma, gamma * lam)
    if gaps == "zero":
        advantages = jnp.where(mask, advantages, 0.0)
    return jax.lax.stop_gradient((advantages, advantages + values))


def length_adaptive_lam(mask: Array, *, alpha: Scalar = 0.05) -> Array:
    """λ that grows with response length, so that the first token still sees the score.

        λ = 1 − 1 / max(α · l, 1),    l = real tokens of the row

    Then (1 − λ) · l is at most 1 / α. Up to 1 / α tokens (20 at α = 0.05) λ is 0, that
    is TD errors, so use a larger α for short responses. The policy gradient is biased
    even with an exact critic, because the length depends on later tokens.

    Args:
        mask: `[B, T]` bool, True on real tokens.
        alpha: `[]`, α, positive.

    Returns:
        `[B]` float32, in [0, 1).

    Raises:
        AssertionError: if `mask` is not a bool matrix.

    References:
        Yue et al., 2025, VAPO, arXiv:2504.05118, section 4.2.
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    lengths = jnp.sum(mask.astype(jnp.float32), axis=1)
    return 1.0 - 1.0 / jnp.maximum(_scalar(alpha) * lengths, 1.0)


def td_errors(
    rewards: Array, values: Array, mask: Array, *, gamma: Scalar = 1.0
) -> Array:
    """One-step temporal-difference errors, δ_t = r_t + γ · V(s_{t+1}) − V(s_t).

    Args:
        rewards: `[B, T]` float, r_t.
        values: `[B, T]` float, V(s_t), before token t.
        mask: `[B, T]` bool, True on real tokens.
        gamma: `[]`, discount per token, in [0, 1].

    Returns:
        `[B, T]` float32, 0 where `mask` is False, without a gradient.

    Raises:
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Sutton and Barto, Reinforcement Learning, 2nd ed., eq. 6.5.
    """
    rewards, values = _check_and_mask(rewards, values, mask)
    end = jnp.zeros_like(values[:, 0])
    errors = rewards + _scalar(gamma) * _next_real(values, mask, end) - values
    return jax.lax.stop_gradient(jnp.where(mask, errors, 0.0))


def n_step_returns(
    rewards: Array, values: Array, mask: Array, *, n: int, gamma: Scalar = 1.0
) -> Array:
    """n-step returns, bootstrapped by the critic: the targets of n-step TD.

        R_t = Σ_{k<n} γ^k · r_{t+k} + γ^n · V(s_{t+n})

    Steps count real tokens only. Rewards and value after the last real token are 0, so
    n ≥ T gives the Monte-Carlo return.

    Args:
        rewards: `[B, T]` float, r_t.
        values: `[B, T]` float, V(s_t), before token t.
        mask: `[B, T]` bool, True on real tokens.
        n: number of rewards, at least 1.
        gamma: `[]`, discount per token, in [0, 1].

    Returns:
        `[B, T]` float32, 0 where `mask` is False, without a gradient.

    Raises:
        ValueError: when `n` is below 1.
        AssertionError: on a wrong rank, unequal shapes or a wrong dtype.

    References:
        Sutton and Barto, Reinforcement Learning, 2nd ed., eq. 7.1.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1 step")
    rewards, values = _check_and_mask(rewards, values, mask)
    gamma = _scalar(gamma)

    end = jnp.zeros_like(values[:, 0])

    def look_one_further(_, returns: Array) -> Array:
        # The return over k + 1 steps is r_t + γ · (that over k steps from t + 1).
        return jnp.where(mask, rewards + gamma * _next_real(returns, mask, end), 0.0)

    steps = min(int(n), rewards.shape[1])  # more steps change nothing
    returns = jax.lax.fori_loop(0, steps, look_one_further, values)
    return jax.lax.stop_gradient(returns)


def _scalar(x: Scalar) -> Array:
    """`[]` float32. A NumPy float64 would change the dtype of a loop carry under x64,
    and an array would be broadcast along the last axis."""
    x = jnp.asarray(x, jnp.float32)
    chex.assert_rank(x, 0)
    return x


def _check_and_mask(rewards: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Rewards and values as float32, 0 where `mask` is False."""
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type([rewards, values, mask], [float, float, bool])
    # `where`, not `* mask`: padding may hold NaN or inf, and 0 * NaN is NaN.
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    return rewards, values


def _steps(mask: Array, gaps: str) -> Array:
    """`[B, T]` bool: the tokens that are steps of the recursion."""
    if gaps == "carry":
        return mask
    if gaps == "zero":
        return column_indices(mask) <= last_token_index(mask)[:, None]
    raise ValueError(f"gaps={gaps!r}: expected 'carry' or 'zero'")


def _gae_scan(
    rewards: Array,
    values: Array,
    targets: Array,
    end: Array,
    real: Array,
    gamma: Array,
    decay: Array,
) -> Array:
    def step_back(carry: tuple[Array, Array], token: tuple[Array, ...]):
        next_advantage, next_target = carry
        reward, value, is_real, *slow_value = token
        target = slow_value[0] if slow_value else value
        delta = reward + gamma * next_target - value
        advantage = delta + decay * next_advantage
        carry = (
            jnp.where(is_real, advantage, next_advantage),
            jnp.where(is_real, target, next_target),
        )
        return carry, jnp.where(is_real, advantage, 0.0)

    tokens = [rewards.T, values.T, real.T]  # scan runs over the leading axis
    if targets is not values:  # reading the same array twice costs a third more
        tokens.append(targets.T)
    # Not unrolled: on a CPU that is slower and takes longer to compile.
    _, advantages = jax.lax.scan(
        step_back, (jnp.zeros_like(end), end), tuple(tokens), reverse=True
    )
    return advantages.T


def _gae_associative(
    rewards: Array,
    values: Array,
    targets: Array,
    end: Array,
    real: Array,
    gamma: Array,
    decay: Array,
) -> Array:
    # A_t = d_t + g_t · A_{t+1}; a masked token has d = 0 and g = 1. Composing maps x ↦
    # d + g·x avoids division by powers of γλ, which underflow in long rows.
    deltas = rewards + gamma * _next_real(targets, real, end) - values
    deltas = jnp.where(real, deltas, 0.0)
    decays = jnp.where(real, decay[:, None] if decay.ndim else decay, 1.0)

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]):
        d_later, g_later = later
        d_earlier, g_earlier = earlier
        return d_earlier + g_earlier * d_later, g_earlier * g_later

    advantages, _ = jax.lax.associative_scan(
        compose, (deltas, decays), reverse=True, axis=1
    )
    return jnp.where(real, advantages, 0.0)


def _next_real(x: Array, mask: Array, end: Array) -> Array:
    """`[B, T]`: x at the next real token of the row, `end` (`[B]`) after the last."""
    here = jnp.where(mask, column_indices(x), x.shape[1])
    after = jnp.pad(here[:, 1:], ((0, 0), (0, 1)), constant_values=x.shape[1])
    index = jax.lax.cummin(after, axis=1, reverse=True)  # T where there is none
    return jnp.take_along_axis(
        jnp.concatenate([x, end[:, None]], axis=1), index, axis=1
    )

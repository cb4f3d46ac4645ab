"""Every function under every way of calling it.

NumPy's numbers as options, 64-bit types, `vmap`, half precision, one row of one token.
Results are compared with those of plain calls, which the other files hold against hand
arithmetic; float32 is what is promised.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rj
from rlhf_jax.algo.group_advantages import (
    center_in_groups,
    group_std,
    group_sum,
    largest_of_others,
)

B, T, V = 4, 3, 5
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).astype(bool)


def arrays(seed=3):
    """Rows of 3, 2, 1 and 0 tokens, NaN beneath the padding."""
    rng = np.random.default_rng(seed)

    def per_token():
        return jnp.array(np.where(MASK, rng.normal(size=(B, T)), np.nan), jnp.float32)

    return {
        "scores": jnp.array(rng.normal(size=B), jnp.float32),
        "rewards": per_token(),
        "values": per_token(),
        "logprobs": per_token(),
        "ref": per_token(),
        "mask": jnp.array(MASK),
        "logits": jnp.array(rng.normal(size=(B, T, V)), jnp.float32),
        "hidden": jnp.array(rng.normal(size=(B, T, 2)), jnp.float32),
        "unembedding": jnp.array(rng.normal(size=(2, V)), jnp.float32),
        "tokens": jnp.array(rng.integers(0, V, (B, T)), jnp.int32),
        "lengths": jnp.array([3, 2, 1, 0], jnp.int32),
    }


def rewards_and_values(x):
    return x["rewards"], x["values"], x["mask"]


def shaping(x):
    return x["scores"], x["logprobs"], x["ref"], x["mask"]


# By name: the function of the arrays, and its options as Python's numbers.
CASES = {
    "gae": (lambda x, **o: rj.gae(*rewards_and_values(x), **o), {"gamma": 0.9}),
    "gae, λ": (
        lambda x, **o: rj.gae(*rewards_and_values(x), method="associative", **o),
        {"gamma": 0.9, "lam": 0.5},
    ),
    "length_adaptive_lam": (
        lambda x, **o: rj.length_adaptive_lam(x["mask"], **o),
        {"alpha": 0.7},
    ),
    "td_errors": (
        lambda x, **o: rj.td_errors(*rewards_and_values(x), **o),
        {"gamma": 0.9},
    ),
    "n_step_returns": (
        lambda x, **o: rj.n_step_returns(*rewards_and_values(x), **o),
        {"n": 2, "gamma": 0.9},
    ),
    "rewards_to_go": (
        lambda x, **o: rj.rewards_to_go(x["rewards"], x["mask"], **o),
        {"gamma": 0.9},
    ),
    "shape_rewards": (
        lambda x, **o: rj.shape_rewards(*shaping(x), **o),
        {"kl_coef": 0.3},
    ),
    "penalize_missing_eos": (
        lambda x, **o: rj.penalize_missing_eos(x["scores"], x["mask"][:, -1], **o),
        {"penalty": 0.3},
    ),
    "group_advantages": (
        lambda x, **o: rj.group_advantages(x["scores"], **o),
        {"groups": 2, "ddof": 0, "eps": 0.1},
    ),
    "group_advantages, batch": (
        lambda x, **o: rj.group_advantages(
            x["scores"], scale="batch-std", baseline="leave-one-out", **o
        ),
        {"groups": 2, "ddof": 0, "eps": 0.1},
    ),
    "center_in_groups": (
        lambda x, **o: center_in_groups(x["scores"], **o),
        {"groups": 2},
    ),
    "group_sum": (lambda x, **o: group_sum(x["scores"], **o), {"groups": 2}),
    "group_std": (
        lambda x, **o: group_std(x["scores"], **o),
        {"groups": 2, "ddof": 0},
    ),
    "largest_of_others": (
        lambda x, **o: largest_of_others(x["scores"], **o),
        {"groups": 2},
    ),
    "opo_advantages": (
        lambda x, **o: rj.opo_advantages(x["scores"], x["lengths"], **o),
        {"groups": 2},
    ),
    "gpg_advantages": (
        lambda x, **o: rj.gpg_advantages(x["scores"], scale="std", **o),
        {"groups": 2, "ddof": 0, "eps": 0.1},
    ),
    "pass_at_k_advantages": (
        lambda x, **o: rj.pass_at_k_advantages(x["scores"], scale="std", **o),
        {"groups": 2, "ddof": 0, "eps": 0.1},
    ),
    "token_logprobs": (
        lambda x, **o: rj.token_logprobs(x["logits"], x["tokens"], **o),
        {"temperature": 0.7},
    ),
    "token_entropy": (
        lambda x, **o: rj.token_entropy(x["logits"], **o),
        {"temperature": 0.7},
    ),
    "fused_token_logprobs": (
        lambda x, **o: rj.fused_token_logprobs(
            x["hidden"], x["unembedding"], x["tokens"], **o
        ),
        {"temperature": 0.7, "softcap": 2.0, "chunk_size": 5},
    ),
    "soft_cap": (lambda x, **o: rj.soft_cap(x["logits"], **o), {"cap": 2.0}),
    "transform_logits": (
        lambda x, **o: rj.transform_logits(x["logits"][:, 0], **o),
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
    ),
    "sample_token": (
        lambda x, **o: rj.sample_token(jax.random.key(0), x["logits"][:, 0], **o)[1],
        {"temperature": 0.7, "top_k": 1, "top_p": 0.9, "min_p": 0.05},
    ),
    "sample_token, greedy": (
        lambda x, **o: rj.sample_token(jax.random.key(0), x["logits"][:, 0], **o)[1],
        {"temperature": 0.0},
    ),
    "best_of_n_mean": (
        lambda x, **o: rj.best_of_n_mean(x["scores"][None], x["scores"][None], **o),
        {"n": 2},
    ),
    "pass_at_k": (
        lambda x, **o: rj.pass_at_k(x["lengths"], **o),
        {"num_samples": 3, "k": 2},
    ),
    "combine_scores": (
        lambda x, **o: rj.combine_scores(
            x["hidden"][:, :, 0], how="mean-minus-std", **o
        ),
        {"penalty": 0.5},
    ),
    "soft_overlong_penalty": (
        lambda x, **o: rj.soft_overlong_penalty(x["lengths"], **o),
        {"limit": 4, "buffer": 3},
    ),
    "normalize_scores": (
        lambda x, **o: rj.normalize_scores(
            x["scores"],
            rj.update_score_moments(rj.init_score_moments(), x["scores"]),
            **o,
        ),
        {"eps": 0.1},
    ),
    "preference_loss": (
        lambda x, **o: rj.preference_loss(x["scores"], x["scores"][::-1], **o),
        {"label_smoothing": 0.1},
    ),
    "pairwise_ranking_loss": (
        lambda x, **o: rj.pairwise_ranking_loss(
            x["values"], x["rewards"], mask=x["mask"], **o
        ),
        {"margin_step": 0.5, "label_smoothing": 0.1},
    ),
    "split_minibatches": (
        lambda x, **o: rj.split_minibatches(jax.random.key(0), x["scores"], **o),
        {"num_minibatches": 2},
    ),
    "clip_cov_loss": (
        lambda x, **o: rj.clip_cov_loss(
            x["logprobs"],
            x["ref"],
            x["rewards"],
            x["mask"],
            key=jax.random.key(0),
            **o,
        ),
        {"fraction": 0.5},
    ),
    "kl_cov_loss": (
        lambda x, **o: rj.kl_cov_loss(
            x["logprobs"], x["ref"], x["rewards"], x["mask"], **o
        ),
        {"fraction": 0.5, "kl_coef": 0.3},
    ),
}


def as_numpy(options, integer, real):
    return {k: (real if type(v) is float else integer)(v) for k, v in options.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kinds", [(np.int64, np.float64), (np.int32, np.float32)])
def test_numpy_numbers_are_numbers(name, kinds):
    fn, options = CASES[name]
    got = fn(arrays(), **as_numpy(options, *kinds))
    # float32 of 0.9 or 0.7 is what the Python number becomes too.
    jax.tree.map(np.testing.assert_array_equal, got, fn(arrays(), **options))


@pytest.mark.parametrize("name", CASES)
def test_results_are_float32_with_64_bit_types_on(maybe_jit, name):
    fn, options = CASES[name]
    want = fn(arrays(), **options)
    # As users have it: strict promotion would refuse NumPy's scalars before any use.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        fn = functools.partial(fn, **as_numpy(options, np.int64, np.float64))
        got = maybe_jit(fn)(arrays())
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    if name != "split_minibatches":  # its random bits are wider, so its order another
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            got,
            want,
        )


@pytest.mark.parametrize("name", CASES)
def test_padding_and_empty_rows_leave_no_nan(name):
    fn, options = CASES[name]
    for result in jax.tree.leaves(fn(arrays(), **options)):
        assert not np.isnan(result).any()


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_a_loop(name):
    fn, options = CASES[name]
    fn = functools.partial(fn, **options)
    batches = [arrays(seed) for seed in (3, 4)]
    got = jax.vmap(fn)(jax.tree.map(lambda *x: jnp.stack(x), *batches))
    want = jax.tree.map(lambda *x: np.stack(x), *map(fn, batches))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want
    )


# These give back the dtype they got, multiply in it, or are parts that take float32.
IN_THEIR_OWN_DTYPE = {"soft_cap", "split_minibatches", "fused_token_logprobs"} | {
    *("center_in_groups", "group_sum", "group_std", "largest_of_others")
}


@pytest.mark.parametrize("name", sorted(CASES.keys() - IN_THEIR_OWN_DTYPE))
def test_half_precision_is_read_as_float32(name):
    def cast(x, dtype):
        return x.astype(dtype) if x.dtype in (jnp.float32, jnp.bfloat16) else x

    fn, options = CASES[name]
    low = {k: cast(x, jnp.bfloat16) for k, x in arrays().items()}
    got = fn(low, **options)
    want = fn({k: cast(x, jnp.float32) for k, x in low.items()}, **options)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("row", [0, 3])
def test_one_row_of_one_token(maybe_jit, name, row):
    fn, options = CASES[name]
    x = {
        k: v if k == "unembedding" else v[row : row + 1, *[slice(1)] * (v.ndim > 1)]
        for k, v in arrays().items()
    }
    one = dict.fromkeys(options.keys() & {"groups", "num_minibatches", "n"}, 1)
    for result in jax.tree.leaves(maybe_jit(functools.partial(fn, **options | one))(x)):
        assert not np.isnan(result).any()


def test_bound_of_a_numpy_number_of_samples_is_a_python_number():
    assert type(rj.best_of_n_kl(np.int64(2))) is float
    # log 2 − 1/2
    np.testing.assert_allclose(rj.best_of_n_kl(np.int64(2)), 0.193147, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("transform_logits", "top_p", np.float32(1.5)),
        ("transform_logits", "min_p", np.float32(-0.5)),
        ("preference_loss", "label_smoothing", np.float32(0.5)),
        ("combine_scores", "penalty", np.float32(-1)),
        ("combine_scores", "penalty", float("nan")),
        ("soft_cap", "cap", np.float32(0)),
        ("soft_cap", "cap", -2.0),
    ],
)
def test_numbers_out_of_range_are_named(name, option, value):
    fn, options = CASES[name]
    with pytest.raises(ValueError, match=rf"{option}={value}: expected"):
        fn(arrays(), **options | {option: value})


@pytest.mark.parametrize("name", ["gae", "gae, λ", "td_errors", "n_step_returns"])
def test_a_discount_per_row_or_token_is_refused(name):
    # Broadcasting would take one of `[T]`, in `gae` one of `[B]`, in silence.
    fn, options = CASES[name]
    for size in (B, T):
        with pytest.raises(AssertionError, match="rank"):
            fn(arrays(), **options | {"gamma": jnp.full(size, 0.9)})


@pytest.mark.parametrize("lam", [jnp.full(1, 0.5), jnp.full(T, 0.5)])
def test_lam_is_one_number_or_one_per_row(lam):
    with pytest.raises(AssertionError, match="shape"):
        rj.gae(*rewards_and_values(arrays()), lam=lam)

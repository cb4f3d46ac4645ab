"""Adapters: what they compute, what they share, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import with_head
from rlhf_jax.models.linear import Linear
from rlhf_jax.models.lora import (
    LoraOptions,
    attach,
    init_adapters,
    linear_layers,
    merge,
    target_layers,
)
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama

MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def trained_adapters(params, options):
    trained = init_adapters(jax.random.key(0), params, options)
    return jax.tree.map(
        lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), trained
    )


def apply_linear(x, **leaves):
    linear = Linear(
        2,
        use_bias=False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        kernel_init=jax.nn.initializers.zeros,
    )
    return linear.apply({"params": leaves}, x)


def test_one_product_by_hand():
    x = jnp.array([[1.0, 2.0]])
    kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    a, b = jnp.array([[3.0], [-1.0]]), jnp.array([[0.5, 2.0]])
    # x A = 3 − 2 = 1, times B is (0.5, 2), on top of x.
    y = apply_linear(x, kernel=kernel, lora_a=a, lora_b=b)
    np.testing.assert_allclose(y, [[1.5, 4.0]], rtol=1e-6)


def test_kernels_of_8_bits_by_hand():
    kernel = jnp.array([[100, -2], [50, 4]], jnp.int8)
    scale = jnp.array([0.01, 0.5])
    # x W is (100 + 2 · 50, −2 + 2 · 4) before the scales.
    y = apply_linear(jnp.array([[1.0, 2.0]]), kernel=kernel, kernel_scale=scale)
    np.testing.assert_allclose(y, [[2.0, 3.0]], rtol=1e-6)


def test_dropout_keeps_the_mean_and_follows_the_key():
    x = jnp.ones((4000, 2))
    leaves = {"kernel": jnp.zeros((2, 2)), "lora_a": jnp.eye(2), "lora_b": jnp.eye(2)}

    def dropped(seed):
        key = jax.random.key_data(jax.random.key(seed))
        return apply_linear(x, **leaves, lora_rate=jnp.float32(0.25), lora_key=key)

    y = dropped(0)
    np.testing.assert_allclose(np.unique(y), [0.0, 4 / 3], rtol=1e-6)
    assert abs(float(y.mean()) - 1.0) < 0.03  # three standard deviations
    np.testing.assert_array_equal(y, dropped(0))
    assert (y != dropped(1)).any()


@pytest.mark.parametrize("name", MODELS)
def test_fresh_adapters_change_no_bit(name, run, batch):
    module, params = MODELS[name](vocab_size=40)
    options = LoraOptions(rank=3)
    whole = attach(params, init_adapters(jax.random.key(0), params, options), options)
    np.testing.assert_array_equal(
        run(module, whole, *batch), run(module, params, *batch)
    )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_attached_and_merged_compute_the_same(name, scan, run, batch):
    module, params = MODELS[name](vocab_size=40)
    module = module.clone(scan_layers=scan)
    options = LoraOptions(rank=3, alpha=2, targets=("query", "d*", "up"))
    trained = trained_adapters(params, options)
    attached = run(module, attach(params, trained, options), *batch)
    merged = run(module, merge(params, trained, options), *batch)
    real = batch[1]
    np.testing.assert_allclose(attached[real], merged[real], rtol=1e-4, atol=1e-4)
    assert np.abs(attached - run(module, params, *batch))[real].max() > 0.05


def test_merged_matrix_by_loops():
    _, params = tiny_llama()
    options = LoraOptions(rank=2, alpha=3, targets=("value",), rslora=True)
    trained = trained_adapters(params, options)
    merged = merge(params, trained, options)
    pair = {k: np.asarray(v, np.float64) for k, v in trained["layers"]["value"].items()}
    for layer in range(2):
        change = pair["lora_a"][layer] @ pair["lora_b"][layer] * 3 / 2**0.5
        want = params["layers"]["value"]["kernel"][layer] + change
        got = merged["layers"]["value"]["kernel"][layer]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert merged["layers"]["key"] is params["layers"]["key"]
    assert merged["token_embedding"] is params["token_embedding"]


def test_distribution_of_fresh_adapters():
    _, params = tiny_llama()
    trained = init_adapters(jax.random.key(0), params, LoraOptions(rank=64))
    for name, width in (("query", 32), ("down", 64)):
        a = np.asarray(trained["layers"][name]["lora_a"])
        bound = width**-0.5  # PyTorch's kaiming_uniform_(a=√5) is U(±1/√fan_in)
        assert a.shape == (2, width, 64) and a.dtype == np.float32
        assert np.abs(a).max() < bound and np.abs(a).max() > 0.99 * bound
        assert abs(a.std() - bound / 3**0.5) < 0.02 * bound
        assert not trained["layers"][name]["lora_b"].any()
    first, second = (trained["layers"][n]["lora_a"] for n in ("query", "key"))
    assert (first != second).any()


def test_the_base_is_shared_and_left_alone():
    _, params = tiny_llama()
    options = LoraOptions(rank=2, targets=("query",))
    names = set(params["layers"]["query"])
    whole = attach(params, trained_adapters(params, options), options)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found = whole
        for key in path:
            found = found[key.key]
        assert found is leaf
    assert set(params["layers"]["query"]) == names


def test_the_score_vector_is_trained_as_a_copy():
    module, params = tiny_gpt2("reward")
    trained = init_adapters(jax.random.key(0), params, LoraOptions(rank=2))
    assert trained["score"] is not params["score"]
    np.testing.assert_array_equal(trained["score"], params["score"])
    changed = trained | {"score": trained["score"] + 1}
    whole = attach(params, changed, LoraOptions(rank=2))
    np.testing.assert_array_equal(whole["score"], params["score"] + 1)
    _, bare = with_head(module, merge(params, changed, LoraOptions(rank=2)), "value")
    np.testing.assert_array_equal(bare["score"], params["score"] + 1)


def test_dropout_is_drawn_for_each_layer_and_matrix(batch):
    module, params = tiny_llama(vocab_size=40)
    options = LoraOptions(rank=2, dropout=0.5, targets=("query", "up"))
    trained = trained_adapters(params, options)
    plain = attach(params, trained, options)
    assert "lora_key" not in plain["layers"]["query"]
    whole = attach(params, trained, options, key=jax.random.key(1))
    keys = [np.asarray(whole["layers"][n]["lora_key"]) for n in ("query", "up")]
    assert len({tuple(row) for row in np.concatenate(keys)}) == 4
    tokens, mask = batch
    logits = jax.jit(lambda p: module.apply({"params": p}, tokens, mask))
    assert np.abs(logits(whole) - logits(plain))[mask].max() > 1e-3


def test_targets():
    _, gpt2 = tiny_gpt2()
    _, llama = tiny_llama()
    assert set(linear_layers(gpt2)) == {"query", "key", "value", "output", "up", "down"}
    assert set(linear_layers(llama)) == set(linear_layers(gpt2)) | {"gate"}
    assert set(target_layers(llama, ("q*", "value"))) == {"query", "value"}
    with pytest.raises(ValueError, match=r"lora.targets='gate' .* it has .*query"):
        target_layers(gpt2, ("query", "gate"))


def test_scale():
    assert LoraOptions(rank=4, alpha=6).scale == 1.5
    assert LoraOptions(rank=4, alpha=6, rslora=True).scale == 3.0


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1, "dropout": 1.0}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match=r"rank=0|dropout=1\.0"):
        LoraOptions(**options)

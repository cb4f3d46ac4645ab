"""Kernels in 8 bits: exact where they can be, bounded errors elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import load_pretrained, save_pretrained
from rlhf_jax.models.linear import Linear
from rlhf_jax.models.lora import LoraOptions, init_adapters, merge
from rlhf_jax.models.quantize import (
    dequantize,
    quantize,
    quantize_kernels,
    quantized_leaf,
)
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama

MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def test_by_hand():
    # Columns with largest magnitudes 2.54, 1.27 and 0: scales 0.02, 0.01 and 1.
    kernel = jnp.array([[2.54, -1.27, 0.0], [-1.0, 0.005, 0.0], [0.031, 0.0149, 0.0]])
    integers, scale = quantize(kernel)
    np.testing.assert_allclose(scale, [0.02, 0.01, 1.0], rtol=1e-6)
    # 0.031 / 0.02 = 1.55, 0.0149 / 0.01 = 1.49; 0.5 rounds to the even 0.
    np.testing.assert_array_equal(integers, [[127, -127, 0], [-50, 0, 0], [2, 1, 0]])
    assert integers.dtype == jnp.int8 and scale.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_is_at_most_half_a_step(dtype):
    kernel = jax.random.normal(jax.random.key(0), (3, 40, 5)).astype(dtype)
    integers, scale = quantize(kernel)
    exact = np.asarray(kernel, np.float64)
    back = np.asarray(integers, np.float64) * np.asarray(scale)[:, None]
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - exact) <= 0.5 * step * (1 + 1e-5)).all()
    assert (np.abs(integers).max(axis=1) == 127).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_network_reads_what_the_integers_say(name, run, batch):
    module, params = MODELS[name](vocab_size=40)
    small = quantize_kernels(params)
    real = batch[1]
    ours = run(module, small, *batch)[real]
    np.testing.assert_allclose(
        ours, run(module, dequantize(small), *batch)[real], rtol=1e-4, atol=1e-4
    )
    # Random weights and sums of them: 8 bits are about 1 % of the logits' spread.
    full = run(module, params, *batch)[real]
    error = np.sqrt(np.mean((ours - full) ** 2)) / full.std()
    assert 1e-4 < error < 0.03


def test_only_kernels_of_blocks():
    _, params = tiny_gpt2()
    small = quantize_kernels(params)
    assert small["token_embedding"] is params["token_embedding"]
    query = small["layers"]["query"]
    assert query["kernel"].dtype == jnp.int8
    assert query["kernel_scale"].shape == (2, 32)
    assert query["bias"] is params["layers"]["query"]["bias"]
    norm = small["layers"]["attention_norm"]["scale"]
    assert norm is params["layers"]["attention_norm"]["scale"]


def test_while_loading(tmp_path):
    module, params = tiny_llama()
    save_pretrained(tmp_path, module, params)
    seen = []

    def convert(name, leaf):
        seen.append(name)
        return quantized_leaf(name, leaf)

    _, loaded = load_pretrained(tmp_path, convert=convert)
    jax.tree.map(np.testing.assert_array_equal, loaded, quantize_kernels(params))
    assert len(seen) == len(set(seen)) == len(jax.tree.leaves(params))


def test_adapters_are_not_merged_into_integers():
    _, params = tiny_llama()
    options = LoraOptions(rank=1)
    trained = init_adapters(jax.random.key(0), params, options)
    with pytest.raises(ValueError, match=r"layers/\w+/kernel is stored in int8"):
        merge(quantize_kernels(params), trained, options)


def test_scales_are_not_rounded_to_half_precision():
    linear = Linear(
        1,
        use_bias=False,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        kernel_init=jax.nn.initializers.zeros,
    )
    leaves = {"kernel": jnp.array([[100]], jnp.int8), "kernel_scale": jnp.ones(1)}
    leaves["kernel_scale"] *= 1.003  # in bfloat16 it would be 1
    y = linear.apply({"params": leaves}, jnp.ones((1, 1)))
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == jnp.bfloat16(100.3) == 100.5

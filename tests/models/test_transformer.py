"""Properties of the network that need no oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.tiny import tiny_gemma, tiny_gpt2, tiny_llama

MODELS = pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_gemma])
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # another order of summation


def shifted(tokens, mask, columns):
    """The same rows with as much more padding on the left."""
    wider = np.full((len(tokens), columns), 5, np.int32)
    return (
        np.concatenate([wider, tokens], axis=1),
        np.concatenate([wider == 0, mask], axis=1),
    )


@MODELS
@pytest.mark.parametrize("head", ["lm", "value"])
def test_left_padding_changes_nothing(make, head, run, batch):
    module, params = make(head)
    tokens, mask = batch
    plain = run(module, params, tokens, mask)
    moved = run(module, params, *shifted(tokens, mask, 8))
    np.testing.assert_allclose(moved[:, 8:][mask], plain[mask], **TOLERANCE)


@MODELS
@pytest.mark.parametrize("head", ["lm", "value", "reward"])
def test_ids_under_padding_do_not_matter(make, head, run, batch):
    module, params = make(head)
    tokens, mask = batch
    plain = run(module, params, tokens, mask)
    other = run(module, params, np.where(mask, tokens, 200), mask)
    real = slice(None) if head == "reward" else mask
    np.testing.assert_array_equal(other[real], plain[real])


@MODELS
def test_no_token_sees_the_future(make, run, batch):
    module, params = make()
    tokens, mask = batch
    plain = run(module, params, tokens, mask)
    changed = tokens.copy()
    changed[:, 20:] += 1
    other = run(module, params, changed, mask)
    early = mask & (np.arange(24) < 20)
    np.testing.assert_allclose(other[early], plain[early], **TOLERANCE)
    assert np.abs(other[:, 20:] - plain[:, 20:]).max() > 0.1


@MODELS
def test_decoding_with_a_cache_is_one_full_forward_pass(make, run, batch):
    module, params = make()
    tokens, mask = batch
    prompt, room = 17, 24 + 3  # columns of the prompt; of the cache, three too many
    mask = mask | (np.arange(24) >= prompt - 1)  # prompts of 17, 8, 1 and 1 tokens
    full = run(module, params, tokens, mask)

    @jax.jit
    def prefill(tokens, mask):
        return module.apply({"params": params}, tokens, mask, room, method="prefill")

    @jax.jit
    def decode(tokens, cache):
        return module.apply({"params": params}, tokens, cache, method="decode")

    logits, cache = prefill(tokens[:, :prompt], mask[:, :prompt])
    np.testing.assert_allclose(logits, full[:, prompt - 1], **TOLERANCE)
    for t in range(prompt, 24):
        logits, cache = decode(tokens[:, t], cache)
        np.testing.assert_allclose(logits, full[:, t], **TOLERANCE)


@MODELS
def test_scan_and_remat_change_no_output_and_no_gradient(make, batch):
    module, params = make()
    tokens, mask = (jnp.asarray(x[:2, -16:]) for x in batch)

    def loss_and_grads(module):
        def loss(params):
            logits = module.apply({"params": params}, tokens, mask)
            weights = jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)
            return jnp.mean(jnp.where(mask[..., None], logits * weights, 0.0))

        return jax.jit(jax.value_and_grad(loss))(params)

    plain, grads = loss_and_grads(module)
    reached = np.abs(grads["layers"]["query"]["kernel"]).max(axis=(1, 2))
    assert np.all(reached > 1e-4)  # of every layer
    for variant in (module.clone(scan_layers=True), module.clone(remat=True)):
        other, other_grads = loss_and_grads(variant)
        np.testing.assert_allclose(other, plain, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            other_grads,
            grads,
        )


@MODELS
def test_reward_is_the_value_of_the_last_real_token(make, run, batch):
    module, params = make("reward")
    tokens, mask = batch
    last = np.array([23, 14, 1, 0])
    mask = np.arange(24) <= last[:, None]  # right-padded
    scores = run(module, params, tokens, mask)
    values = run(module.clone(head="value"), params, tokens, mask)
    np.testing.assert_allclose(scores, values[np.arange(4), last], **TOLERANCE)


def test_fresh_parameters_have_the_structure_of_loaded_ones():
    module, params = tiny_llama("value")
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    fresh = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)

"""Adapters that are not what they seem: named, in one line, instead of half used."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import save_pretrained
from rlhf_jax.models.hf.checkpoint import load_model
from rlhf_jax.models.hf.peft_config import is_adapter
from rlhf_jax.models.hf.peft_files import read_adapter, write_adapter
from rlhf_jax.models.lora import LoraOptions, init_adapters, merge, merged_when_read
from rlhf_jax.models.tiny import tiny_llama

OPTIONS = LoraOptions(rank=2, targets=("query", "down"))


@pytest.fixture
def saved(tmp_path):
    """A language model, and an adapter of it as a classifier."""
    save_pretrained(tmp_path / "base", *tiny_llama(vocab_size=40))
    module, params = tiny_llama("reward", vocab_size=40)
    trained = init_adapters(jax.random.key(0), params, OPTIONS)
    base = str(tmp_path / "base")
    write_adapter(tmp_path / "adapter", module, trained, OPTIONS, base=base)
    return module, tmp_path / "adapter"


def edit(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q = "base_model.model.model.layers.1.self_attn.q_proj"
SCORE = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"q_proj has no lora_B\.weight"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), r"q_proj has no lora_A\.weight"),
        (
            lambda t: t.update({SCORE: np.ones((2, 32), np.float32)}),
            r"score\.weight has shape \(2, 32\); this model needs \(1, 32\)",
        ),
        (
            lambda t: t.update({SCORE: np.full((1, 32), np.nan, np.float32)}),
            r"score\.weight has 32 values that are NaN",
        ),
    ],
)
def test_tensors(saved, change, message):
    module, adapter = saved
    edit(adapter, change)
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter, module)


def test_a_classifier_without_a_score_gets_no_random_one(saved):
    _, adapter = saved
    edit(adapter, lambda tensors: tensors.pop(SCORE))
    with pytest.raises(ValueError, match=r"has no score\.weight"):
        load_model(adapter, head="reward")


def test_patterns_that_are_none(saved):
    module, adapter = saved
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"alpha_pattern": {"*q_proj": 1}}
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r'alpha_pattern has "\*q_proj"; supported: '):
        read_adapter(adapter, module)


def test_a_configuration_beside_an_adapter_makes_it_no_model(saved):
    _, adapter = saved
    (adapter / "config.json").write_text("{}")
    assert is_adapter(adapter)
    assert load_model(adapter, head="reward")[0].head == "reward"


def test_a_model_that_is_written_over_an_adapter_is_no_adapter(saved):
    module, adapter = saved
    save_pretrained(adapter, module, tiny_llama("reward", vocab_size=40)[1])
    assert not is_adapter(adapter)
    assert not (adapter / "adapter_config.json").exists()


def test_kernels_merged_one_by_one_are_those_merged_at_once():
    _, params = tiny_llama(vocab_size=40)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
        init_adapters(jax.random.key(0), params, OPTIONS),
    )
    lazy = merged_when_read(params, trained, OPTIONS)["layers"]["down"]["kernel"]
    whole = merge(params, trained, OPTIONS)["layers"]["down"]["kernel"]
    pair, kernel = trained["layers"]["down"], params["layers"]["down"]["kernel"]
    for layer in range(2):  # α / R = 16 / 2
        a, b = (np.asarray(pair[name][layer], np.float64) for name in pair)
        want = np.asarray(kernel[layer], np.float64) + 8.0 * a @ b
        np.testing.assert_allclose(lazy[layer], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(whole[layer], want, rtol=1e-5, atol=1e-5)
    assert (lazy.shape, lazy.dtype) == (kernel.shape, kernel.dtype)

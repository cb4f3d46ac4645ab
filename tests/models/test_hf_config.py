"""Reading and writing `config.json`."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from rlhf_jax.models.config import gpt2_config, llama_config
from rlhf_jax.models.families import config_fields, family_of, read_config
from rlhf_jax.models.rope import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QWEN2 = LLAMA | {"model_type": "qwen2"}
NEOX = LLAMA | {"model_type": "gpt_neox"}
PHI3 = LLAMA | {"model_type": "phi3"}
OPT = LLAMA | {"model_type": "opt", "ffn_dim": 48}
GEMMA2 = LLAMA | {"model_type": "gemma2"}
MISTRAL = LLAMA | {"model_type": "mistral"}
ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALING = Llama3RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
)


@pytest.fixture
def read(tmp_path):
    def read(fields):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return read_config(tmp_path)[1]

    return read


def test_gpt2_with_the_fields_every_version_writes(read):
    config = read(GPT2)
    assert (config.vocab_size, config.max_positions) == (40, 16)
    assert (config.width, config.num_layers, config.num_heads) == (32, 3, 4)
    assert (config.num_kv_heads, config.head_dim, config.mlp_width) == (4, 8, 128)
    assert (config.positions, config.norm) == ("learned", "layer")
    assert (config.activation, config.gated_mlp) == ("gelu_tanh", False)
    assert config.attention_bias and config.output_bias and config.mlp_bias


def test_llama_with_the_fields_every_version_writes(read):
    config = read(LLAMA)
    assert (config.vocab_size, config.max_positions) == (40, 128)
    assert (config.width, config.num_layers, config.num_heads) == (32, 3, 4)
    assert (config.num_kv_heads, config.head_dim, config.mlp_width) == (4, 8, 48)
    assert (config.positions, config.norm) == ("rotary", "rms")
    assert (config.activation, config.gated_mlp) == ("silu", True)
    assert not (config.attention_bias or config.output_bias or config.mlp_bias)
    assert config.rope.scaling is None


def test_absent_fields_mean_what_they_mean_to_transformers(read):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config(**GPT2)
    ours = read(GPT2)
    assert ours.norm_eps == theirs.layer_norm_epsilon
    assert ours.initializer_range == theirs.initializer_range
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    theirs = transformers.LlamaConfig(**LLAMA)
    ours = read(LLAMA)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.initializer_range == theirs.initializer_range
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.attention_bias == theirs.attention_bias


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_parameters": ROPE | {"rope_theta": 7.0}}, 7.0, SCALING),
        ({"rope_theta": 7.0}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": ROPE}, 7.0, SCALING),
        ({"rope_theta": 7.0, "rope_parameters": ROPE}, 7.0, SCALING),
        ({"rope_scaling": {"type": "default"}}, 10_000.0, None),
        # max_position_embeddings stands in for the original length
        (
            {
                "rope_scaling": {
                    k: ROPE[k] for k in ROPE if not k.startswith("original")
                }
            },
            10_000.0,
            dataclasses.replace(SCALING, original_max_positions=128),
        ),
    ],
)
def test_rope_of_transformers_4_and_5(fields, theta, scaling, read):
    config = read(LLAMA | fields)
    assert (config.rope.theta, config.rope.scaling) == (theta, scaling)
    transformers = pytest.importorskip("transformers")
    rope = json.loads(json.dumps(fields))  # transformers changes its argument
    theirs = transformers.LlamaConfig(**LLAMA, **rope).rope_parameters
    assert theirs["rope_theta"] == theta
    if scaling is not None:
        original = theirs["original_max_position_embeddings"]
        assert original == scaling.original_max_positions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (GPT2 | {"activation_function": "tanh"}, 'activation_function="tanh"'),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=false"),
        (
            GPT2 | {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=true",
        ),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention=true"),
        (GPT2 | {"quantization_config": {"bits": 4}}, "quantization_config="),
        (GPT2 | {"n_head": 5}, "num_heads=5"),
        (GPT2 | {"n_layer": "3"}, 'n_layer is "3"'),
        (GPT2 | {"n_layer": 0}, "n_layer is 0"),
        (GPT2 | {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({k: v for k, v in GPT2.items() if k != "n_embd"}, "n_embd is null"),
        (LLAMA | {"hidden_act": "mish"}, 'hidden_act="mish"'),
        (LLAMA | {"num_key_value_heads": 3}, "num_kv_heads=3"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA | {"rope_theta": -1}, "rope_theta is -1"),
        (
            LLAMA | {"rope_scaling": {"type": "ntk", "factor": 2.0}},
            'rope_type="ntk" in rope_scaling',
        ),
        (
            LLAMA | {"rope_parameters": ROPE | {"rope_type": "yarn"}},
            r'\["high_freq_factor", "low_freq_factor"\]',
        ),
        (LLAMA | {"rope_scaling": {"type": "longrope"}}, "short_factor is null"),
        (
            LLAMA | {"rope_scaling": {"type": "dynamic", "factor": "2"}},
            'factor is "2"',
        ),
        (
            PHI3
            | {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 5,
                }
            },
            r"short_factor and long_factor have \[4, 5\] numbers; .* of the 4 pairs",
        ),
        (QWEN2 | {"max_window_layers": "2"}, 'max_window_layers is "2"'),
        (NEOX | {"rotary_pct": 1.5}, "partial_rotary_factor=1.5"),
        (PHI3 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type="),
        (OPT | {"do_layer_norm_before": False}, "do_layer_norm_before=false"),
        (OPT | {"word_embed_proj_dim": 8}, "word_embed_proj_dim=8"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2 | {"layer_types": ["chunked_attention"]}, "layer_types is"),
        (GEMMA2 | {"layer_types": ["sliding_attention"] * 2}, "sliding_layers has 2"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window is 0"),
        (LLAMA | {"rope_parameters": {"factor": 2.0}}, r'\["factor"\]'),
        (
            LLAMA | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (LLAMA | {"rope_parameters": ROPE | {"factor": None}}, "factor is null"),
        (
            LLAMA | {"rope_scaling": ROPE, "original_max_position_embeddings": 32},
            "original_max_position_embeddings=32",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(fields, message, read):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as error:
        read(fields)
    assert "\n" not in str(error.value)


def test_first_layer_with_a_window(read):
    window = {"use_sliding_window": True, "sliding_window": 8}
    for first, want in ((0, (True,) * 3), (1, (False, True, True)), (None, ())):
        config = read(QWEN2 | window | {"max_window_layers": first})
        assert config.sliding_layers == want  # None means 28 of them


def test_unknown_family_names_directory_and_supported_ones(read, tmp_path):
    with pytest.raises(ValueError) as error:
        read(GPT2 | {"model_type": "bert"})
    assert str(error.value) == (
        f'{tmp_path} has a model of model_type="bert"; supported: gpt2, gpt_neox, '
        "opt, llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, olmo2"
    )


def test_directory_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist; .*hf download"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)


def small_gpt2():
    return gpt2_config(
        vocab_size=40, max_positions=16, width=32, num_layers=3, num_heads=4
    )


def small_llama(**options):
    return llama_config(
        vocab_size=40, max_positions=16, width=32, num_layers=3, num_heads=4, **options
    )


@pytest.mark.parametrize(
    "config",
    [
        small_gpt2(),
        dataclasses.replace(
            small_gpt2(), mlp_width=20, tie_embeddings=False, norm_eps=0.1,
            initializer_range=0.3,
        ),
        small_llama(num_kv_heads=2, mlp_width=20, rope_theta=7.0),
        dataclasses.replace(
            small_llama(rope_scaling=SCALING, tie_embeddings=True), head_dim=16,
            attention_bias=True, output_bias=True, mlp_bias=True, norm_eps=0.1,
        ),
        small_llama(rope_scaling=LinearRopeScaling(factor=2.0)),
        small_llama(
            rope_scaling=DynamicRopeScaling(factor=2.0, original_max_positions=16)
        ),
        small_llama(
            rope_scaling=YarnRopeScaling(
                factor=4.0, original_max_positions=8, attention_factor=1.2,
                beta_fast=16.0, truncate=False,
            )
        ),
        small_llama(
            rope_scaling=LongRopeScaling(
                short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(2.0, 3.0, 4.0, 5.0),
                original_max_positions=8, attention_factor=1.1,
            )
        ),
    ],
)  # fmt: skip
def test_what_is_written_is_read_back(config, read):
    assert read(config_fields(config, "lm", jnp.float32)) == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(small_gpt2(), head_dim=16), "head_dim=16 cannot be saved"),
        (dataclasses.replace(small_gpt2(), output_bias=False), "output_bias=False"),
        (dataclasses.replace(small_gpt2(), norm="rms"), "norm='rms'"),
        (dataclasses.replace(small_llama(), attention_bias=True), "output_bias=False"),
        (dataclasses.replace(small_llama(), norm="layer"), "loaded as 'rms'"),
        (dataclasses.replace(small_llama(), gated_mlp=False), "gated_mlp=False"),
        (
            dataclasses.replace(small_llama(), logit_softcap=3.0),
            "logit_softcap=3.0 cannot be saved: in a llama checkpoint",
        ),
        (dataclasses.replace(small_llama(), family="mine"), "family='mine'"),
    ],
)
def test_what_its_family_cannot_express_is_not_saved(config, message):
    with pytest.raises(ValueError, match=message):
        family_of(config)


def test_a_classifier_has_one_label():
    fields = config_fields(small_llama(), "reward", jnp.bfloat16)
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert len(fields["id2label"]) == len(fields["label2id"]) == 1
    assert fields["dtype"] == fields["torch_dtype"] == "bfloat16"
    fields = config_fields(small_llama(), "lm", jnp.float32)
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert "id2label" not in fields

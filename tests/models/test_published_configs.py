"""`config.json` of published checkpoints: each is read, and has its published size."""

import json
import math

import jax
import pytest

from rlhf_jax.models.families import config_fields, read_config
from rlhf_jax.models.hf.tensor_layout import parameter_shapes
from rlhf_jax.models.transformer import Transformer

# The fields that say what is computed, as the files on the hub have them.
CONFIGS = {
    "gpt2": (
        124_439_808,
        {
            "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
            "attn_pdrop": 0.1, "n_embd": 768, "n_head": 12, "n_layer": 12,
            "n_positions": 1024, "layer_norm_epsilon": 1e-05, "vocab_size": 50257,
        },
    ),
    "pythia-70m": (
        70_426_624,
        {
            "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512,
            "intermediate_size": 2048, "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048, "num_attention_heads": 8,
            "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25,
            "tie_word_embeddings": False, "use_parallel_residual": True,
            "vocab_size": 50304,
        },
    ),
    "opt-125m": (
        125_239_296,
        {
            "model_type": "opt", "_remove_final_layer_norm": False,
            "activation_function": "relu", "do_layer_norm_before": True,
            "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02,
            "max_position_embeddings": 2048, "num_attention_heads": 12,
            "num_hidden_layers": 12, "vocab_size": 50272, "word_embed_proj_dim": 768,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama", "attention_bias": False, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        },
    ),
    "SmolLM2-135M": (
        134_515_008,
        {
            "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
            "hidden_size": 576, "intermediate_size": 1536, "rope_interleaved": False,
            "max_position_embeddings": 8192, "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896,
            "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "max_window_layers": 28,
            "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            "model_type": "gemma2", "attention_bias": False,
            "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "intermediate_size": 9216, "max_position_embeddings": 8192,
            "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "vocab_size": 256000,
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            "model_type": "gemma3_text", "attention_bias": False,
            "attn_logit_softcapping": None, "cache_implementation": "hybrid",
            "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "intermediate_size": 6912, "max_position_embeddings": 32768,
            "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144,
        },
    ),
    "Phi-3-mini-128k": (
        3_821_079_552,
        {
            "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
            "intermediate_size": 8192, "max_position_embeddings": 131072,
            "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144,
            "rope_scaling": {
                "type": "su", "long_factor": [1.25] * 48, "short_factor": [1.0] * 48,
            },
            "tie_word_embeddings": False, "vocab_size": 32064,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        },
    ),
    "OLMo-2-0425-1B": (
        1_484_916_736,
        {
            "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 500000,
            "tie_word_embeddings": False, "vocab_size": 100352,
        },
    ),
}  # fmt: skip


def read(fields, directory):
    (directory / "config.json").write_text(json.dumps(fields))
    return read_config(directory)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_has_its_published_number_of_parameters(name, tmp_path):
    published, fields = CONFIGS[name]
    _, config = read(fields, tmp_path)
    shapes = parameter_shapes(Transformer(config)).values()
    assert sum(math.prod(leaf.shape) for leaf in shapes) == published


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name, tmp_path):
    _, config = read(CONFIGS[name][1], tmp_path)
    fields = config_fields(config, "lm", jax.numpy.bfloat16)
    assert read(fields, tmp_path)[1] == config


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, config = read(CONFIGS[name][1], tmp_path)
    read(config_fields(config, "lm", jax.numpy.bfloat16), tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == family.model_type
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path)[1] == config


def test_layers_of_gemma_take_turns(tmp_path):
    _, second = read(CONFIGS["gemma-2-2b"][1], tmp_path)
    assert second.sliding_layers == (True, False) * 13
    _, third = read(CONFIGS["gemma-3-1b"][1], tmp_path)
    assert third.sliding_layers == (*(True,) * 5, False) * 4 + (True, True)
    assert third.local_rope.theta == 10_000.0
    assert third.rope.theta == 1_000_000.0


def test_long_texts_of_phi_are_sharpened(tmp_path):
    _, config = read(CONFIGS["Phi-3-mini-128k"][1], tmp_path)
    # √(1 + ln 32 / ln 4096) = √(1 + 5/12)
    assert config.rope.scaling.attention_factor == pytest.approx((17 / 12) ** 0.5)

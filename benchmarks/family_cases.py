"""Small models of every family, with the features specific to it.

Requires PyTorch. Widths, windows and original lengths are chosen so that 24 tokens
exceed every limit: windows slide, and scaled RoPE frequencies differ from unscaled
ones.
"""

# pyright: reportMissingImports=false

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import transformers

SIZES: Mapping[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}
SHORT = GROUPED | {"max_position_embeddings": 16}  # 24 tokens are more
TOKENS: Mapping[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "num_labels": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.25],
    "long_factor": [1.5, 4.0],
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _scaled(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **options}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model.

    Attributes:
        family: `model_type`.
        make: its configuration.
        one_length: frequencies depend on the longest row of a batch in PyTorch, of
            each row here: responses are compared only in batches of one length.
    """

    family: str
    make: Callable[[], Any]
    one_length: bool = False


def _case(family: str, config: Any, *sizes: Mapping[str, Any], **options: Any) -> Case:
    one_length = options.pop("one_length", False)
    fields: dict[str, Any] = {}
    for some in (*sizes, TOKENS, options):
        fields |= some
    return Case(family=family, make=lambda: config(**fields), one_length=one_length)


GPT2_SIZES = {
    **{"vocab_size": 48, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
}

CASES: dict[str, Case] = {
    "gpt2": _case("gpt2", transformers.GPT2Config, GPT2_SIZES),
    "gpt2, untied": _case(
        "gpt2",
        transformers.GPT2Config,
        GPT2_SIZES,
        tie_word_embeddings=False,
        n_inner=20,
    ),
    "gpt_neox (Pythia)": _case(
        "gpt_neox",
        transformers.GPTNeoXConfig,
        SIZES,
        intermediate_size=64,
        rotary_pct=0.5,
    ),
    "gpt_neox, sequential, tied": _case(
        "gpt_neox",
        transformers.GPTNeoXConfig,
        SIZES,
        intermediate_size=64,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        attention_bias=False,
        rope_parameters=_scaled("linear", factor=2.0, partial_rotary_factor=0.25),
    ),
    "opt": _case("opt", transformers.OPTConfig, SIZES, ffn_dim=64),
    "llama (2)": _case("llama", transformers.LlamaConfig, SIZES, intermediate_size=40),
    "llama (3), llama3 rope": _case(
        "llama", transformers.LlamaConfig, GROUPED, rope_parameters=LLAMA3
    ),
    "llama, linear rope, biases": _case(
        "llama",
        transformers.LlamaConfig,
        GROUPED,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_scaled("linear", factor=4.0),
    ),
    "llama, dynamic rope": _case(
        "llama",
        transformers.LlamaConfig,
        SHORT,
        rope_parameters=_scaled("dynamic", factor=2.0),
        one_length=True,
    ),
    "llama, yarn rope": _case(
        "llama", transformers.LlamaConfig, GROUPED, rope_parameters=YARN
    ),
    "llama, tied (SmolLM)": _case(
        "llama",
        transformers.LlamaConfig,
        GROUPED,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        head_dim=16,
    ),
    "mistral": _case("mistral", transformers.MistralConfig, GROUPED, sliding_window=6),
    "qwen2": _case("qwen2", transformers.Qwen2Config, GROUPED),
    "qwen2, window, yarn, tied": _case(
        "qwen2",
        transformers.Qwen2Config,
        GROUPED,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        tie_word_embeddings=True,
        rope_parameters=YARN,
    ),
    "qwen3": _case(
        "qwen3",
        transformers.Qwen3Config,
        GROUPED,
        head_dim=16,
        tie_word_embeddings=True,
    ),
    "gemma2": _case(
        "gemma2",
        transformers.Gemma2Config,
        GROUPED,
        head_dim=16,
        sliding_window=6,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": _case(
        "gemma3_text",
        transformers.Gemma3TextConfig,
        GROUPED,
        head_dim=16,
        sliding_window=6,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=GEMMA3_ROPE,
    ),
    "phi3": _case("phi3", transformers.Phi3Config, GROUPED, sliding_window=6),
    "phi3, long rope, partial": _case(
        "phi3",
        transformers.Phi3Config,
        GROUPED,
        original_max_position_embeddings=16,
        rope_parameters=LONGROPE,
        tie_word_embeddings=True,
        one_length=True,
    ),
    "olmo2": _case("olmo2", transformers.Olmo2Config, GROUPED),
}

"""The transformer, its Hugging Face checkpoints and tokenizers."""

from rlhf_jax.models.chat import render_chat
from rlhf_jax.models.config import DecoderConfig, Head, gpt2_config, llama_config
from rlhf_jax.models.heads import with_head
from rlhf_jax.models.hf.hf_weights import load_pretrained, save_pretrained
from rlhf_jax.models.sharding import parameter_sharding
from rlhf_jax.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_jax.models.transformer import Transformer

__all__ = [
    "DecoderConfig",
    "Head",
    "Transformer",
    "gpt2_config",
    "llama_config",
    "load_pretrained",
    "load_tokenizer",
    "parameter_sharding",
    "render_chat",
    "save_pretrained",
    "train_tokenizer",
    "with_head",
]

"""The peers' networks for a benchmark's sizes.

Imported only by their interpreter.
"""

# pyright: reportMissingImports=false

import torch
import transformers
from shape import Shape


def make_config(shape: Shape) -> transformers.PretrainedConfig:
    """Without special tokens: responses always reach the limit."""
    positions = shape.prompt + shape.response
    common = {
        "vocab_size": shape.vocab_size,
        "num_labels": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.family == "gpt2":
        return transformers.GPT2Config(
            n_positions=positions,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            **common,
        )
    return transformers.LlamaConfig(
        max_position_embeddings=positions,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        **common,
    )


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""The `transformers` side of `generate.py`: one call of `generate` per turn.

Run by the peers' interpreter, not manually.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

import torch
import transformers
from peer import Turns
from shape import Shape
from torch_models import make_config, synchronize


def main() -> None:
    """Generates until the parent closes the pipe."""
    turns = Turns()
    settings = json.loads(sys.argv[1])
    shape = Shape(**settings["shape"])
    device = torch.device("cpu" if settings["cpu"] else "cuda")
    dtype = torch.bfloat16 if shape.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(shape))
    model = model.to(device=device, dtype=dtype).eval()
    turns.report(
        {
            "versions": {m.__name__: m.__version__ for m in (transformers, torch)},
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
    )
    while True:
        prompts = torch.randint(shape.vocab_size, (shape.batch, shape.prompt))
        prompts = prompts.to(device)
        turns.wait()
        synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            sequences = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=shape.response,
                do_sample=True,
                top_k=0,
            )
        synchronize()
        turns.report(
            {
                "seconds": time.perf_counter() - start,
                "new_tokens": sequences.numel() - prompts.numel(),
            }
        )


if __name__ == "__main__":
    main()

"""The cost of storing a frozen base in 16 or 8 bits.

    python benchmarks/base_storage.py --model runs/quickstart/sft/model \\
        --data runs/quickstart/demonstrations_held_out.jsonl

Error of logits on held-out texts compared with float32: root mean square difference
over the standard deviation of the logits. Also perplexity on these texts, and bytes.
Activations are float32 throughout.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from rlhf_jax.algo.types import Demonstrations
from rlhf_jax.cli import quieten_libraries
from rlhf_jax.data.batches import pad_examples
from rlhf_jax.data.encoding import encode_examples
from rlhf_jax.data.text_data import Columns, read_examples
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.models.quantize import quantized_leaf

STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "int8": {"convert": quantized_leaf},
}


def read_rows(model: Path, data: Path, limit: int, max_tokens: int) -> Demonstrations:
    """Held-out texts, as in `rlhf-jax sft`."""
    tokenization = Tokenization.load(model)
    found = read_examples(data, columns=Columns(), render_chat=tokenization.render)
    encoded = encode_examples(
        found.rows[:limit], tokenization.encoder, max_tokens=max_tokens
    )
    return pad_examples(encoded.rows, width=encoded.width, pad_id=tokenization.pad_id)


def measure(model: Path, rows: Demonstrations) -> list[dict[str, Any]]:
    """A row for each way of storing the model."""
    tokens, mask = jnp.asarray(rows.tokens), jnp.asarray(rows.mask)
    predicted = np.asarray(rows.target_mask)[:, 1:]
    found, exact = [], np.zeros(())
    for name, options in STORED.items():
        module, params = load_pretrained(model, **options)
        module = module.clone(dtype=jnp.float32)
        logits = jax.jit(lambda p, m=module: m.apply({"params": p}, tokens, mask))
        chosen = np.asarray(logits(params), np.float64)[:, :-1][predicted]
        if name == "float32":
            exact = chosen
        spread = np.std(exact - exact.mean(axis=-1, keepdims=True))
        log_z = np.log(np.exp(chosen - chosen.max(axis=-1, keepdims=True)).sum(axis=-1))
        log_z += chosen.max(axis=-1)
        target = np.asarray(rows.tokens)[:, 1:][predicted]
        nll = np.mean(log_z - chosen[np.arange(len(target)), target])
        found.append(
            {
                "stored": name,
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
                "logit_error": float(np.sqrt(np.mean((chosen - exact) ** 2)) / spread),
                "perplexity": math.exp(nll),
            }
        )
    return found


def main() -> None:
    """Prints a table, and JSON as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="held-out texts")
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()
    quieten_libraries()
    rows = read_rows(
        arguments.model, arguments.data, arguments.limit, arguments.max_tokens
    )
    found = measure(arguments.model, rows)
    print("| stored | size | relative error of logits | perplexity | change |")
    print("|---|--:|--:|--:|--:|")
    for row in found:
        change = row["perplexity"] / found[0]["perplexity"] - 1
        print(
            f"| {row['stored']} | {row['bytes'] / 1e6:.2f} MB | "
            f"{row['logit_error']:.2%} | {row['perplexity']:.4f} | {change:+.3%} |"
        )
    timing.print_result(
        {"benchmark": "base_storage", "machine": timing.machine(), "rows": found}
    )


if __name__ == "__main__":
    main()

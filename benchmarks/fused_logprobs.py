"""Log-probabilities and entropies of tokens, with and without all logits in memory.

    python benchmarks/fused_logprobs.py
    python benchmarks/fused_logprobs.py --shapes 8x512x1024x151936 --dtype bfloat16

`fused` is `rlhf_jax.fused_token_logprobs`; `whole` multiplies all hidden states by the
output matrix and calls `token_logprobs` and `token_entropy`. Each runs forward only and
with the gradients of both inputs. Temporary memory is that of the compiled program,
without inputs and outputs. The two must agree before they are timed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from rlhf_jax import fused_token_logprobs, token_entropy, token_logprobs
from rlhf_jax.algo.types import Array

SHAPES = [(32, 64, 256, 512), (32, 64, 256, 50257)]
SMOKE_SHAPES = [(2, 8, 16, 64)]

LogprobsFn = Callable[[Array, Array, Array], tuple[Array, Array]]


def whole(hidden: Array, unembedding: Array, tokens: Array) -> tuple[Array, Array]:
    """By way of `[B, T, V]` logits."""
    logits = jnp.dot(hidden, unembedding, preferred_element_type=jnp.float32)
    return token_logprobs(logits, tokens), token_entropy(logits)


def with_gradients(method: LogprobsFn) -> Callable[..., Any]:
    """Results, and gradients of a loss that uses both of them."""

    def loss(hidden, unembedding, tokens):
        logprobs, entropy = method(hidden, unembedding, tokens)
        return -jnp.mean(logprobs) - 0.01 * jnp.mean(entropy)

    return jax.value_and_grad(loss, argnums=(0, 1))


def draw_inputs(shape: tuple[int, int, int, int], dtype: str) -> tuple[Array, ...]:
    """Hidden states of unit variance, logits of unit variance."""
    batch, length, width, vocab_size = shape
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, length, width), dtype),
        jax.random.normal(keys[1], (width, vocab_size), dtype) * width**-0.5,
        jax.random.randint(keys[2], (batch, length), 0, vocab_size),
    )


def check_agreement(results: dict[str, Any], dtype: str) -> None:
    """Raises unless both agree, up to rounding in the gradients' dtype."""
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for fused, other in zip(*map(jax.tree.leaves, results.values()), strict=True):
        fused, other = np.asarray(fused, "float32"), np.asarray(other, "float32")
        scale = float(np.max(np.abs(other)))
        np.testing.assert_allclose(fused, other, rtol=0, atol=tolerance * scale)


def measure(
    shape: tuple[int, int, int, int], dtype: str, budget: float
) -> dict[str, Any]:
    """Seconds and temporary bytes of both methods, forward and with gradients."""
    inputs = draw_inputs(shape, dtype)
    methods = {"fused": fused_token_logprobs, "whole": whole}
    row: dict[str, Any] = {"shape": shape, "dtype": dtype}
    for work in ("forward", "with_gradients"):
        compiled, row[work] = {}, {}
        for name, method in methods.items():
            function = method if work == "forward" else with_gradients(method)
            lowered = jax.jit(function).lower(*inputs)
            compile_s, compiled[name] = timing.timed(lowered.compile)
            memory = compiled[name].memory_analysis()
            row[work][name] = {
                "compile_s": compile_s,
                "temporary_bytes": memory and memory.temp_size_in_bytes,
            }
        check_agreement({name: call(*inputs) for name, call in compiled.items()}, dtype)
        calls = {
            name: lambda call=call: call(*inputs) for name, call in compiled.items()
        }
        for name, seconds in timing.alternate(calls, budget=budget).items():
            row[work][name] |= timing.summary(seconds)
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line per shape, method and kind of work."""
    print(f"{'[B, T, D, V]':24}{'work':>16}{'method':>8}{'median ms':>12}{'MB':>10}")
    for row in rows:
        for work in ("forward", "with_gradients"):
            for name, found in row[work].items():
                memory = found["temporary_bytes"]
                megabytes = "" if memory is None else f"{memory / 1e6:,.1f}"
                print(
                    f"{list(row['shape'])!s:24}{work:>16}{name:>8}"
                    f"{1e3 * found['median_s']:>12.2f}{megabytes:>10}"
                )


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`16x64x256x50257` → (16, 64, 256, 50257)."""
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected BxTxDxV")
    batch, length, width, vocab_size = map(int, parts)
    return batch, length, width, vocab_size


def main() -> None:
    """Checks and times both; prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", metavar="BxTxDxV", help="instead"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds per line pair; default 2"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="quick test with a tiny shape"
    )
    arguments = parser.parse_args()
    shapes = arguments.shapes or (SMOKE_SHAPES if arguments.smoke else SHAPES)
    budget = 0.1 if arguments.smoke else arguments.budget

    machine = timing.machine()
    timing.print_machine(machine)
    rows = [measure(shape, arguments.dtype, budget) for shape in shapes]
    print_table(rows)
    timing.print_result(
        {"benchmark": "fused_logprobs", "rows": rows, "machine": machine}
    )


if __name__ == "__main__":
    main()

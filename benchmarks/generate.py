"""New tokens per second of the sampler, compared with `generate` of `transformers`.

    python benchmarks/generate.py
    python benchmarks/generate.py --vocab-size 50257 --batch 16 --transformers

All prompts have the same length, all responses the maximum length; temperature 1, no
truncation of the distribution. Without shape flags two shapes run: a small vocabulary,
where the transformer dominates, and GPT-2's, where the output matrix does. The two
sides alternate. Times include the whole call with prefill; compilation is reported
separately.
"""

import argparse
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
from networks import draw_prompts, init_params, make_module
from peer import Peer, add_python_argument, make_environment
from shape import SMOKE, Shape, add_shape_arguments, given_shape

from rlhf_jax.algo.types import Array, Params, Prompts, Rollout
from rlhf_jax.models.callables import policy
from rlhf_jax.rollout import generate

SHAPES = [Shape(), Shape(vocab_size=50257, batch=16)]


class JaxSampler:
    """This library: one call of the compiled sampler per turn."""

    def __init__(self, shape: Shape):
        module = make_module(shape, "lm")
        actor = policy(module)
        param_key, self._key = jax.random.split(jax.random.key(0))
        self._params = jax.block_until_ready(init_params(module, param_key))
        self._shape = shape
        self._random = np.random.default_rng(0)
        self._calls = 0

        @jax.jit
        def sample(
            params: Params, run_key: Array, step: int, prompts: Prompts
        ) -> Rollout:
            return generate(
                jax.random.fold_in(run_key, step),
                params,
                prompts,
                prefill=actor.prefill,
                decode=actor.decode,
                max_new_tokens=shape.response,
                stop_ids=(),
            )

        self._sample = sample

    def take_turn(self) -> dict[str, Any]:
        """Responses to a batch of new prompts."""
        prompts = draw_prompts(self._random, self._shape)
        seconds, rollout = timing.timed(
            lambda: self._sample(self._params, self._key, self._calls, prompts)
        )
        self._calls += 1
        return {
            "seconds": seconds,
            "new_tokens": int(np.asarray(rollout.lengths).sum()),
        }


def run(shape: Shape, rounds: int, python: Path | None) -> dict[str, Any]:
    """A warm-up of each side, then `rounds` calls of each in turn."""
    compiled = timing.Compilations()
    ours = JaxSampler(shape)
    before = compiled.seconds
    jax_reports = [ours.take_turn()]
    compile_s = compiled.seconds - before
    if python is None:
        jax_reports += [ours.take_turn() for _ in range(rounds)]
        theirs = None
    else:
        settings = {
            "shape": dataclasses.asdict(shape),
            "cpu": jax.default_backend() == "cpu",
        }
        with Peer(python, "generate_transformers.py", settings) as transformers:
            about = transformers.hello()
            reports = [transformers.take_turn()]
            for _ in range(rounds):
                jax_reports.append(ours.take_turn())
                reports.append(transformers.take_turn())
        theirs = summarize(reports, shape) | about
    return {
        "shape": dataclasses.asdict(shape),
        "rlhf_jax": summarize(jax_reports, shape) | {"compile_s": compile_s},
        "transformers": theirs,
    }


def summarize(reports: list[dict[str, Any]], shape: Shape) -> dict[str, Any]:
    """Median and best rate; the first report warms up.

    Raises:
        RuntimeError: a response was shorter than the limit.
    """
    expected = shape.batch * shape.response
    for report in reports:
        if report["new_tokens"] != expected:
            raise RuntimeError(
                f"{report['new_tokens']} new tokens in one call; expected {expected}"
            )
    seconds = [report["seconds"] for report in reports[1:]]
    return timing.summary(seconds) | {
        "new_tokens_per_s": expected / statistics.median(seconds),
        "best_new_tokens_per_s": expected / min(seconds),
    }


def print_row(row: dict[str, Any]) -> None:
    """A line per side."""
    print(Shape(**row["shape"]))
    for side in ("rlhf_jax", "transformers"):
        if row[side] is not None:
            rate, best = (
                row[side]["new_tokens_per_s"],
                row[side]["best_new_tokens_per_s"],
            )
            print(f"  {side:14}{rate:>10,.0f} new tokens/s, best {best:,.0f}")


def parse_arguments() -> tuple[argparse.Namespace, list[Shape]]:
    """Flags, and the shapes they describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape_arguments(parser, Shape())
    parser.add_argument("--rounds", type=int, help="timed calls; default 10, smoke 2")
    parser.add_argument(
        "--transformers",
        action="store_true",
        help="measure transformers too; --trl-python implies it",
    )
    add_python_argument(parser)
    parser.add_argument(
        "--smoke", action="store_true", help="quick test with a tiny shape"
    )
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 2 if arguments.smoke else 10
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    shape = given_shape(parser, arguments, SMOKE if arguments.smoke else Shape())
    return arguments, SHAPES if shape == Shape() else [shape]


def main() -> None:
    """Measures one or two shapes; prints rates and a line of JSON."""
    arguments, shapes = parse_arguments()
    # Read when JAX first uses a GPU: leaves memory for the other side.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    python = arguments.trl_python
    if python is None and arguments.transformers:
        python = make_environment()

    machine = timing.machine()
    timing.print_machine(machine)
    rows = []
    for shape in shapes:
        rows.append(run(shape, arguments.rounds, python))
        print_row(rows[-1])
    timing.print_result({"benchmark": "generate", "rows": rows, "machine": machine})


if __name__ == "__main__":
    main()

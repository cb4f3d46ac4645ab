"""What saving a checkpoint costs the steps of a run.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --millions 10 --rounds 3

The state is that of AdamW: parameters and two moments, float32. Rounds alternate
between three ways: steps without saving, with checkpoints, and with checkpoints whose
checksums are patched away. In each round one checkpoint is saved and steps go on until
it is complete. Reported, of the fastest round of each number, are the seconds that
`save` blocks, the seconds until the checkpoint is complete, and the median step during
that time relative to one without saving. Checkpoints go to `--directory`, a temporary
one by default: the disk matters.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import timing

from rlhf_jax.run import checksums
from rlhf_jax.run.checkpointer import Checkpointer, Keep

WAYS = ("no saving", "saving", "saving without checksums")


def make_state(millions: float) -> dict[str, Any]:
    """Parameters in matrices of 4 MB and two moments, and a vector to step on."""
    count = max(1, round(millions * 1e6 / 1024**2))
    state = {
        f"{kind} {number}": jnp.full((1024, 1024), 1e-3 * number, jnp.float32)
        for kind in ("parameters", "first moment", "second moment")
        for number in range(count)
    }
    return jax.block_until_ready(state)


@jax.jit
def one_step(x: jax.Array) -> jax.Array:
    """Work for the cores, as an update would give them."""
    for _ in range(4):
        x = jnp.tanh(x @ x)
    return x


@contextlib.contextmanager
def unchecked():
    """No checksums; files are not synced either."""
    write = checksums.write_checksums
    checksums.write_checksums = lambda directory: None
    try:
        yield
    finally:
        checksums.write_checksums = write


def steps_while(x: jax.Array, is_due) -> list[float]:
    """Seconds of each step, until nothing is due."""
    seconds = []
    while is_due() or len(seconds) < 3:
        took, x = timing.timed(lambda x=x: one_step(x))
        seconds.append(took)
    return seconds


def one_round(
    directory: Path, step: int, state: dict[str, Any], *, way: str, fewest: int
) -> dict[str, float]:
    """Saves once in a way, and steps until the checkpoint is complete."""
    x = jnp.ones((700, 700), jnp.float32) / 700
    if way == "no saving":
        left = iter(range(fewest))
        taken = steps_while(x, lambda: next(left, None) is not None)
        return {"step": statistics.median(taken)}
    target = directory / str(step)
    skip = unchecked() if "without" in way else contextlib.nullcontext()
    with skip, Checkpointer(directory, keep=Keep(latest=1)) as checkpointer:
        begun = time.perf_counter()
        checkpointer.save(step, state, {})
        blocked = time.perf_counter() - begun
        taken = steps_while(x, lambda: not target.exists())
        complete = time.perf_counter() - begun
    return {"blocked": blocked, "complete": complete, "step": statistics.median(taken)}


def measure(directory: Path, state: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The lowest over rounds by way; the first round is discarded."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for place, way in enumerate(WAYS):
            step = 1 + number * len(WAYS) + place
            row = one_round(directory, step, state, way=way, fewest=30)
            if number:
                found[way].append(row)
    return {
        way: {name: min(row[name] for row in rows) for name in rows[0]}
        for way, rows in found.items()
    }


def main() -> None:
    """The command line; the last line of output is JSON."""
    parser = argparse.ArgumentParser(description="The cost of saving")
    parser.add_argument("--millions", type=float, default=64, help="of parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="disk to write to")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, once")
    options = parser.parse_args()
    if options.smoke:
        options.millions, options.rounds = 1, 1
    state = make_state(options.millions)
    gigabytes = sum(leaf.nbytes for leaf in state.values()) / 1e9
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        fastest = measure(Path(temporary), state, options.rounds)
    plain = fastest["no saving"]["step"]
    print(f"state of {gigabytes:.2f} GB, fastest of {options.rounds} rounds")
    for way in WAYS[1:]:
        row = fastest[way]
        print(
            f"{way}: save blocks {row['blocked']:.2f} s, complete after "
            f"{row['complete']:.2f} s, steps meanwhile × {row['step'] / plain:.2f}"
        )
    with_sums, without = (fastest[way]["complete"] for way in WAYS[1:])
    print(f"checksums and syncing: × {with_sums / without:.2f} until complete")
    machine = timing.machine()
    timing.print_machine(machine)
    result = {"gigabytes": gigabytes, "rounds": options.rounds, "fastest": fastest}
    timing.print_result({"machine": machine} | result)


if __name__ == "__main__":
    main()

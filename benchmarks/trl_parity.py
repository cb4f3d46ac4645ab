"""Compares PPO updates with those of TRL 1.12's `PPOTrainer`, quantity by quantity.

    python benchmarks/trl_parity.py                # first creates .venv-trl for TRL
    python benchmarks/trl_parity.py --case llama   # one of the cases

TRL initializes four models and prompts of unequal lengths, and samples responses, some
of which stop early. It then trains with its own loop. This library reads the same model
directories, prompts, responses and order of minibatches, and computes everything else:
one row of the table per quantity, from scores to the weights after the last update.
Exit code 1 if a row exceeds its tolerance. Both sides run on the CPU, in float32.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import timing
from peer import Peer, add_python_argument, make_environment
from shape import Shape
from trl_parity_jax import TRAINED, JaxSide, change_of_weights

from rlhf_jax.config import ppo_presets as presets
from rlhf_jax.config.ppo import PPOMethod

Numbers = Mapping[str, np.ndarray]

SHAPE = Shape(
    vocab_size=32,
    width=32,
    layers=2,
    heads=4,
    batch=16,
    prompt=6,
    response=12,
    epochs=3,
    minibatches=2,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A family of models, and how a batch is split; see `CASES`."""

    family: str
    minibatches: int
    microbatches: int  # TRL's `gradient_accumulation_steps`, of a whole batch

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one update.

        With accumulation TRL takes one an epoch, whatever `num_mini_batches` says.
        """
        return SHAPE.epochs * (self.minibatches if self.microbatches == 1 else 1)


CASES = {
    "gpt2": Case(family="gpt2", minibatches=2, microbatches=1),
    "llama": Case(family="llama", minibatches=2, microbatches=1),
    "microbatches": Case(family="gpt2", minibatches=2, microbatches=4),
}

METHOD = dataclasses.replace(
    presets.trl(),
    scores=dataclasses.replace(
        presets.trl().scores, missing_eos="subtract", missing_eos_penalty=1.0
    ),
    actor_optimizer=dataclasses.replace(
        presets.trl().actor_optimizer,
        learning_rate=3e-4,  # moves small models far enough to clip
        # At the default, 1e-8, the rounding of a gradient that is 0 would move the key
        # biases of GPT-2, which no output depends on, by a tenth of the other weights.
        eps=1e-5,
    ),
)
"""The `trl` preset, changed where its defaults would hide differences."""

# Rounding of float32, 1.2e-7, grown by a few dozen sums and products: the networks,
# and what follows from them, with the weights that were loaded. Measured below 1e-6.
FORWARD = 1e-5
# The same with weights that already differ by rounding. Measured below 3e-5. One token
# on the other side of a clip is 1e-2.
AFTER_STEPS = 1e-4
# Adam divides by √v + ε. Where a gradient is much smaller than ε = 1e-5, as that of the
# attention's key biases is, which no output depends on, its rounding is multiplied by
# 1e5. Measured 3e-5 to 4e-4. A single tensor left out of the update would give 1, for
# Adam moves all of them about as far.
WEIGHTS = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Difference of one quantity between the two sides."""

    name: str
    shape: tuple[int, ...]
    difference: float  # max |this library − TRL|
    largest: float  # max |TRL|
    tolerance: float  # of the relative difference; 0: equal

    @property
    def relative(self) -> float:
        """Difference over the largest value."""
        return self.difference / self.largest if self.largest else float("nan")

    @property
    def agrees(self) -> bool:
        """False for NaN, and if all values are 0, which would test nothing."""
        return self.relative <= self.tolerance


def compare(ours: Numbers, trl: Numbers, tolerances: Mapping[str, float]) -> list[Row]:
    """A row per quantity, in the order of the tolerances."""
    rows = []
    for name, tolerance in tolerances.items():
        if ours[name].shape != trl[name].shape:
            raise ValueError(f"{name}: {ours[name].shape} against {trl[name].shape}")
        rows.append(
            Row(
                name=name,
                shape=trl[name].shape,
                difference=float(np.max(np.abs(ours[name] - trl[name]))),
                largest=float(np.max(np.abs(trl[name]))),
                tolerance=tolerance,
            )
        )
    return rows


def tolerances(update: int) -> dict[str, float]:
    """By quantity. Only the first update starts from equal weights."""
    start = FORWARD if update == 1 else AFTER_STEPS
    per_token = (
        "scores, less the penalty",
        "old log-probabilities",
        "reference log-probabilities",
        "KL to the reference",
        "values",
        "shaped rewards",
        "advantages, whitened",
        "returns",
    )
    per_step = (
        "policy loss",
        "value loss",
        "approximate KL",
        "clip fraction",
        "value clip fraction",
    )
    return (
        {"answer lengths": 0.0}
        | dict.fromkeys(per_token, start)
        | dict.fromkeys(per_step, AFTER_STEPS)
        | {"actor, change": WEIGHTS, "critic, change": WEIGHTS}
    )


def trl_numbers(found: Numbers, *, microbatch: int) -> dict[str, np.ndarray]:
    """TRL's quantities, by the names of the table, 0 after the end of a response.

    Args:
        found: local variables of its `train()`, by its names.
        microbatch: sequences per microbatch.
    """
    real, with_end_state = ~found["padding_mask"], ~found["padding_mask_p1"]
    num_steps, num_microbatches = found["steps"].shape[:2]
    batch = found["responses"].shape[0]

    def per_step(name: str) -> np.ndarray:
        stats = found[name]  # [epochs, minibatches, gradient_accumulation_steps]
        # It fills as many as a minibatch has microbatches; the others stay 0.
        used = max(batch // stats.shape[1] // microbatch, 1)
        return stats[:, :, :used].reshape(num_steps, num_microbatches).mean(axis=1)

    log_ratio = found["logprobs"] - found["ref_logprobs"]
    return {
        "answer lengths": found["sequence_lengths"] + 1,
        "scores, less the penalty": found["scores"],
        "old log-probabilities": np.where(real, found["logprobs"], 0.0),
        "reference log-probabilities": np.where(real, found["ref_logprobs"], 0.0),
        "KL to the reference": np.where(real, log_ratio, 0.0),
        "values": np.where(with_end_state, found["values"], 0.0),
        "shaped rewards": np.where(with_end_state, found["rewards"], 0.0),
        "advantages, whitened": found["advantages"],
        "returns": np.where(with_end_state, found["returns"], 0.0),
        "policy loss": per_step("pg_loss_stats"),
        "value loss": per_step("vf_loss_stats"),
        "approximate KL": per_step("approxkl_stats"),
        "clip fraction": per_step("pg_clipfrac_stats"),
        "value clip fraction": per_step("vf_clipfrac_stats"),
    }


def make_settings(case: Case, updates: int, directory: Path) -> dict[str, Any]:
    """Settings of both sides."""
    shape = dataclasses.replace(SHAPE, family=case.family, minibatches=case.minibatches)
    # More than are used: on the last batch of its data TRL does not accumulate.
    num_prompts = shape.batch * (updates + 2)
    return {
        "shape": dataclasses.asdict(shape),
        "directory": str(directory),
        "stop_id": 7,
        "pad_id": shape.vocab_size,
        "num_prompts": num_prompts,
        "total_updates": updates + 2,
        "optimizer_steps": case.optimizer_steps,
        "trainer": {  # of its PPOConfig; all else is at its defaults, as in METHOD
            "seed": 1,
            "total_episodes": num_prompts,
            "per_device_train_batch_size": shape.batch // case.microbatches,
            "gradient_accumulation_steps": case.microbatches,
            "num_mini_batches": shape.minibatches,
            "num_ppo_epochs": shape.epochs,
            "local_rollout_forward_batch_size": shape.batch,
            "response_length": shape.response,
            "missing_eos_penalty": METHOD.scores.missing_eos_penalty,
            "learning_rate": METHOD.actor_optimizer.learning_rate,
            "adam_epsilon": METHOD.actor_optimizer.eps,
        },
    }


def record_trl(
    case: Case, updates: int, python: Path, directory: Path
) -> dict[str, Any]:
    """Makes TRL write its models and quantities to a directory; returns settings."""
    settings = make_settings(case, updates, directory)
    with Peer(python, "trl_parity_trl.py", settings) as trl:
        trl.hello()
        for _ in range(updates):
            trl.take_turn()
    return settings


def compare_case(
    settings: dict[str, Any], updates: int, method: PPOMethod = METHOD
) -> list[list[Row]]:
    """This library's updates on TRL's samples; the rows of each."""
    directory = Path(settings["directory"])
    microbatch = settings["trainer"]["per_device_train_batch_size"]
    ours = JaxSide(settings, method)
    tables = []
    for update in range(1, updates + 1):
        with np.load(directory / f"update-{update}.npz") as file:
            recorded = dict(file)
        trl = trl_numbers(recorded, microbatch=microbatch) | {
            f"{model}, change": change_of_weights(directory, model, update)
            for model in TRAINED
        }
        tables.append(compare(ours.take_turn(recorded), trl, tolerances(update)))
    return tables


def print_table(title: str, rows: list[Row]) -> None:
    """A line per quantity."""
    print(f"\n{title}")
    print(
        f"{'':30}{'shape':>10}{'max |diff|':>12}{'max |TRL|':>12}"
        f"{'relative':>11}{'tolerance':>11}"
    )
    for row in rows:
        shape = "×".join(map(str, row.shape))
        print(
            f"{row.name:30}{shape:>10}{row.difference:12.1e}{row.largest:12.4g}"
            f"{row.relative:11.1e}{row.tolerance:11.0e}"
            f"  {'ok' if row.agrees else 'DIFFERS'}"
        )


def parse_arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), help="default: all of them")
    parser.add_argument("--updates", type=int, default=2, help="default 2")
    add_python_argument(parser)
    arguments = parser.parse_args()
    if arguments.updates < 1:
        parser.error(f"--updates {arguments.updates} must be at least 1")
    return arguments


def main() -> None:
    """Runs the cases, prints their tables, and exits with 1 on differences."""
    arguments = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    python = arguments.trl_python or make_environment()
    start = time.perf_counter()
    cases = [arguments.case] if arguments.case else list(CASES)
    results = {}
    for name in cases:
        with tempfile.TemporaryDirectory() as directory:
            settings = record_trl(
                CASES[name], arguments.updates, python, Path(directory)
            )
            tables = compare_case(settings, arguments.updates)
        for update, rows in enumerate(tables, start=1):
            print_table(f"{name}, update {update}", rows)
        results[name] = tables
    rows = [row for tables in results.values() for table in tables for row in table]
    differ = sum(not row.agrees for row in rows)
    print(
        f"\n{len(rows) - differ} of {len(rows)} quantities agree, "
        f"{time.perf_counter() - start:.0f} s"
    )
    timing.print_result(
        {
            "benchmark": "trl_parity",
            "cases": {
                name: [[dataclasses.asdict(row) for row in table] for table in tables]
                for name, tables in results.items()
            },
            "differ": differ,
        }
    )
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()

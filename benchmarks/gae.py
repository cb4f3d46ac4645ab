"""Five implementations of generalized advantage estimation, on a grid of shapes.

    python benchmarks/gae.py
    python benchmarks/gae.py --shapes 512x1024 64x8192

`scan` and `associative` are the two methods of `rlhf_jax.gae`; `loop` is a NumPy loop
over time; `rlax` is RLax's function with `vmap`; `torch` is the loop of TRL's trainer,
on the same kind of device. `add` adds the two inputs, a lower bound for every method.
All must agree before they are timed. Inputs are float32 and already on the device.
Masks are all True: only the first two support masks, and only they also return value
targets.
"""

import argparse
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

from rlhf_jax import gae

GAMMA, LAM = 0.99, 0.95
SHAPES = [(64, 128), (512, 1024), (128, 4096), (2048, 256), (8, 16384)]
SMOKE_SHAPES = [(4, 16), (2, 64)]

Advantages = Callable[[], Any]


def numpy_loop(rewards: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The definition, backwards over time and vectorized over the batch."""
    advantages = np.zeros_like(rewards)
    advantage = next_value = np.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages


def torch_loop(torch: ModuleType, rewards: Any, values: Any) -> Any:
    """The loop of TRL 1.12, `experimental/ppo/ppo_trainer.py`, to its last line."""
    advantage: Any = 0
    advantages_reversed = []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        advantages_reversed.append(advantage)
    return torch.stack(advantages_reversed[::-1], axis=1)


def optional(name: str) -> ModuleType | str:
    """The module, or why it is unavailable."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return "not installed"
    except AttributeError:  # written for another version of jax
        return "does not import"


def jax_methods(
    rewards: jax.Array, values: jax.Array, rlax: ModuleType | str
) -> dict[str, Advantages]:
    """Compiled functions of arrays on the device."""
    mask = jnp.ones(rewards.shape, bool)
    calls: dict[str, Advantages] = {}
    for method in ("scan", "associative"):
        compiled = jax.jit(functools.partial(gae, gamma=GAMMA, lam=LAM, method=method))
        calls[method] = functools.partial(compiled, rewards, values, mask)
    if isinstance(rlax, ModuleType):
        row = rlax.truncated_generalized_advantage_estimation
        discounts = jnp.full(rewards.shape, GAMMA)

        @jax.jit
        def batch(rewards, values):
            values = jnp.pad(values, ((0, 0), (0, 1)))  # nothing after the end
            return jax.vmap(row, (0, 0, None, 0))(rewards, discounts, LAM, values)

        calls["rlax"] = functools.partial(batch, rewards, values)
    return calls


def torch_method(
    torch: ModuleType, rewards: np.ndarray, values: np.ndarray
) -> Advantages:
    """The loop on a GPU where JAX has one too, else on the CPU."""
    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    inputs = [torch.tensor(x, device=device) for x in (rewards, values)]

    def call():
        advantages = torch_loop(torch, *inputs)
        if on_gpu:
            torch.cuda.synchronize()
        return advantages

    return call


def check_agreement(calls: dict[str, Advantages], expected: np.ndarray) -> None:
    """Raises unless every method matches a float64 loop.

    The tolerance is that of float32 sums of some twenty terms, 1 / (1 - γλ).
    """
    for name, call in calls.items():
        result = call()
        advantages = result[0] if isinstance(result, tuple) else result
        if not isinstance(advantages, np.ndarray | jax.Array):
            advantages = advantages.cpu().numpy()
        np.testing.assert_allclose(
            np.asarray(advantages), expected, rtol=1e-4, atol=1e-4, err_msg=name
        )


def measure(
    batch: int, length: int, modules: dict[str, ModuleType | str], budget: float
) -> dict[str, Any]:
    """Seconds of every method at one shape, and what compiling it took."""
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(2, batch, length)).astype(np.float32)
    inputs = jax.device_put(rewards), jax.device_put(values)
    calls = jax_methods(inputs[0], inputs[1], modules["rlax"])
    compile_s = {name: timing.timed(call)[0] for name, call in calls.items()}
    calls["loop"] = functools.partial(numpy_loop, rewards, values)
    if isinstance(modules["torch"], ModuleType):
        calls["torch"] = torch_method(modules["torch"], rewards, values)
    check_agreement(calls, numpy_loop(rewards.astype(float), values.astype(float)))
    calls["add"] = functools.partial(jax.jit(jnp.add), *inputs)

    # Loops apart: beside them a millisecond's work would get few rounds.
    loops = {name: calls.pop(name) for name in ("loop", "torch") if name in calls}
    samples = timing.alternate(calls, budget=budget)
    samples |= timing.alternate(loops, budget=budget)
    return {
        "batch": batch,
        "length": length,
        "methods": {
            name: timing.summary(seconds) | {"first_call_s": compile_s.get(name)}
            for name, seconds in samples.items()
        },
    }


def print_table(rows: list[dict[str, Any]], modules: dict[str, Any]) -> None:
    """Median milliseconds, and the fastest run in brackets."""
    names = ("scan", "associative", "loop", "rlax", "torch", "add")
    print("milliseconds: median (fastest)")
    print(f"{'[B, T]':>14}" + "".join(f"{name:>18}" for name in names))
    for row in rows:
        cells = []
        for name in names:
            found = row["methods"].get(name)
            if found is None:
                cells.append(str(modules[name]))
            else:
                median, fastest = 1e3 * found["median_s"], 1e3 * found["min_s"]
                cells.append(f"{median:.3f} ({fastest:.3f})")
        shape = f"[{row['batch']}, {row['length']}]"
        print(f"{shape:>14}" + "".join(f"{cell:>18}" for cell in cells))


def parse_shape(text: str) -> tuple[int, int]:
    """`512x1024` → (512, 1024)."""
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) * int(length)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected BxT, such as 512x1024")
    return int(batch), int(length)


def main() -> None:
    """Checks and times every method; prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        metavar="BxT",
        help="instead of the grid",
    )
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds per shape, twice; default 2"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="quick test with tiny shapes"
    )
    arguments = parser.parse_args()
    shapes = arguments.shapes or (SMOKE_SHAPES if arguments.smoke else SHAPES)
    budget = 0.1 if arguments.smoke else arguments.budget

    machine = timing.machine()
    timing.print_machine(machine)
    modules = {name: optional(name) for name in ("rlax", "torch")}
    rows = [measure(b, t, modules, budget) for b, t in shapes]
    print_table(rows, modules)
    absent = {name: why for name, why in modules.items() if isinstance(why, str)}
    timing.print_result(
        {"benchmark": "gae", "rows": rows, "absent": absent, "machine": machine}
    )


if __name__ == "__main__":
    main()

"""Timing and machine description for all benchmarks.

Compilation is reported separately; results are waited for; alternatives are timed
alternately, so that slow periods affect all of them; the last line of standard output
is JSON.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax

_T = TypeVar("_T")

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Compilations:
    """Counts programs compiled since its creation, and their compile time."""

    def __init__(self):
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILE_EVENTS:
            self.seconds += duration_secs
        self.count += event == _COMPILE_EVENTS[-1]


def timed(call: Callable[[], _T]) -> tuple[float, _T]:
    """Seconds of one call until its arrays are computed, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def alternate(
    calls: Mapping[str, Callable[[], Any]], *, budget: float, max_rounds: int = 200
) -> dict[str, list[float]]:
    """Times calls alternately, each once per round, after one discarded round.

    Args:
        calls: calls by name. Every call runs in every round, so group calls of similar
            duration.
        budget: seconds after which no new round starts; three rounds run regardless.
        max_rounds: maximum number of rounds.

    Returns:
        Seconds of each call, by name.
    """
    for call in calls.values():
        timed(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            samples[name].append(timed(call)[0])
    return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Minimum, median and number of samples, in seconds."""
    return {
        "min_s": min(samples),
        "median_s": statistics.median(samples),
        "samples": len(samples),
    }


def peak_rss_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int | None:
    """Peak accelerator memory, or None if the device does not report it."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def machine() -> dict[str, Any]:
    """Device, processor, versions and commit, for the record."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def print_machine(found: dict[str, Any]) -> None:
    """`machine()` in readable form, with a warning if the machine is busy."""
    versions = " ".join(f"{k} {v}" for k, v in found["versions"].items())
    print(f"{found['device']} · {found['processor']}, {found['cores']} cores")
    print(f"python {found['python']} {versions} · commit {found['commit']}")
    if found["load_average"] > 0.5 * found["cores"]:
        print(
            f"WARNING: load average {found['load_average']:.1f}: other processes are "
            "running, which slows\nPyTorch more than XLA. Do not quote these times."
        )


def print_result(result: dict[str, Any]) -> None:
    """The last line of standard output: one JSON object."""
    print(json.dumps(result), flush=True)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return (
            subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
        )
    except FileNotFoundError:
        return None

"""Measures the parts of a step."""

import time
from typing import Any

import jax


class Stopwatch:
    """Seconds since creation, by part."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def lap(self, part: str, result: Any = None) -> None:
        """Adds the time since the last lap to a part.

        Args:
            part: name of the part.
            result: arrays computed by the part; waits for them.
        """
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def metrics(self, num_tokens: float) -> dict[str, float]:
        """Seconds of the parts and in total so far, and tokens per second."""
        seconds = time.perf_counter() - self._began
        parts = {f"time/{name}_seconds": value for name, value in self._parts.items()}
        return parts | {
            "time/step_seconds": seconds,
            "time/tokens_per_second": num_tokens / seconds,
        }

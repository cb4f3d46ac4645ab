"""Logs metrics and samples as JSON lines, and metrics to TensorBoard and W&B."""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.files.atomic import errors_name
from rlhf_jax.files.bounded_json import parse_json
from rlhf_jax.files.bounded_lines import MOST_CHARACTERS
from rlhf_jax.files.printable import shown
from rlhf_jax.files.regular_file import open_regular
from rlhf_jax.files.typed_fields import integer, text

_MOST_STEP = 10**15  # float64, of the charts, holds every step


class _JsonLines:
    """A file of JSON lines with a `step` each, truncated on resume.

    Existing lines of `start_step` and later are from a run that went beyond its last
    checkpoint. They are removed, so that the file of a resumed run equals that of an
    uninterrupted one, and so is an incomplete last line. Every write is flushed.
    """

    def __init__(self, path: str | Path, *, start_step: int):
        self._path = Path(path)
        self._file = None
        if jax.process_index() != 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        length = _length_before(self._path, start_step)
        self._file = open(self._path, "ab")
        self._file.truncate(length)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        assert self._file is not None
        lines = [json.dumps(row, allow_nan=False, ensure_ascii=False) for row in rows]
        # A lone surrogate has no UTF-8 form; "\\ud800" is what JSON writes for it.
        text = "".join(line + "\n" for line in lines)
        with errors_name(self._path):
            self._file.write(text.encode("utf-8", "backslashreplace"))
            self._file.flush()

    def sync(self) -> None:
        """Writes what the system has buffered to disk, in case of a power cut."""
        if self._file is not None:
            with errors_name(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with errors_name(self._path):  # writes again what could not be written
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class MetricsWriter(_JsonLines):
    """One line per step: `{"step": 3, "policy/loss": 0.25, …}`.

    Floats are written with full precision. JSON has no NaN and no infinities: they
    become the strings `"nan"`, `"inf"` and `"-inf"`, which `read_metrics` (and `float`)
    convert back. With several processes only process 0 writes.

    Args:
        path: the JSON-lines file, usually `metrics.jsonl` in the run directory.
        start_step: the first step that this process will write.
        tensorboard: also write TensorBoard files next to `path`.
        wandb: also log to Weights & Biases. Project, entity and mode come from its
            environment variables; a resumed run continues the same W&B run.
        config: configuration to log there.

    Raises:
        ValueError: if a package is missing, or a line of the file is malformed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start_step: int = 0,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Mapping[str, Any] | None = None,
    ):
        directory, writes = Path(path).parent, jax.process_index() == 0
        self._tensorboard = self._wandb = None
        if tensorboard and writes:
            self._tensorboard = _open_tensorboard(directory, start_step)
        if wandb and writes:
            self._wandb = _open_wandb(directory, config or {})
        super().__init__(path, start_step=start_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the line of one step.

        Args:
            step: step of the metrics.
            metrics: name → Python or NumPy number, or scalar array. Arrays are fetched
                from the devices together.

        Raises:
            ValueError: if a value is not a single number, or is named `step`.
        """
        if self._file is None:
            return
        if "step" in metrics:
            raise ValueError(
                "a metric is named 'step'; this name is reserved for the step"
            )
        fetched = jax.device_get(dict(metrics))  # sorts the names
        numbers = {name: _number(name, fetched[name]) for name in metrics}
        texts = {name: _strict(number) for name, number in numbers.items()}
        self._write([{"step": step} | texts])
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Closes all outputs."""
        super().close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class SamplesWriter(_JsonLines):
    """One line per response: `{"step": 3, "prompt": …, "response": …, "score": …}`.

    Args:
        path: the JSON-lines file, usually `samples.jsonl` in the run directory.
        start_step: the first step that this process will write.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0):
        super().__init__(path, start_step=start_step)

    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends the responses of one step.

        Args:
            step: step of the samples.
            samples: rows with the texts `prompt` and `response`, `score` (a number or
                None) and optional further numbers.

        Raises:
            ValueError: if a value is neither text, a single number nor None, or if
                `prompt` or `response` is missing.
        """
        if self._file is None:
            return
        for sample in samples:
            if not {"prompt", "response"} <= sample.keys():
                raise ValueError(
                    f"a sample has the fields {sorted(sample)}; it needs prompt and "
                    "response"
                )
        rows = [
            {name: _text_or_number(name, value) for name, value in sample.items()}
            for sample in samples
        ]
        self._write([{"step": step} | row for row in rows])


def read_metrics(path: str | Path) -> list[dict[str, int | float]]:
    """The lines of a metrics file, without an incomplete last line.

    Raises:
        ValueError: if another line is not a JSON object of numbers with a step, or its
            step is before that of the line above. Names the file and the line.
    """
    rows: list[dict[str, int | float]] = []
    for number, (_, row) in enumerate(_complete_lines(Path(path)), 1):
        place = f"{path}, line {number}"
        rows.append({name: _read_number(place, name, row[name]) for name in row})
    return rows


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a samples file, without an incomplete last line.

    Raises:
        ValueError: if another line is not a JSON object with a step, the texts `prompt`
            and `response`, and numbers, or its step is before that of the line above.
            Names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    for number, (_, row) in enumerate(_complete_lines(Path(path)), 1):
        place = f"{path}, line {number}"
        try:
            text(row, "prompt")
            text(row, "response")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        for name, value in row.items():
            if value is not None and not isinstance(value, str):
                _read_number(place, name, value)
        rows.append(row)
    return rows


def _read_number(place: str, name: str, value: Any) -> int | float:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if not isinstance(value, int | float):
        raise ValueError(f"{place}: {shown(name)} is {shown(value)}, not a number")
    return value


def _length_before(path: Path, start_step: int) -> int:
    """Bytes of the file up to the first line of `start_step` or later."""
    end = 0
    if not path.exists():
        return end
    for line_end, row in _complete_lines(path):
        if row["step"] >= start_step:
            break
        end = line_end
    return end


def _complete_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Each complete line: its end, in bytes, and its content."""
    rows, end = [], 0
    for number, line in enumerate(_raw_lines(path), 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        place = f"{path}, line {number}"
        try:
            row = parse_json(line.decode("utf-8"), place, encodable=False)
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 text ({error.reason})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {shown(row)} is not an object")
        try:
            step = integer(row, "step", least=0, most=_MOST_STEP)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if rows and step < rows[-1][1]["step"]:
            before = rows[-1][1]["step"]
            raise ValueError(f"{place}: step {step} comes after step {before}")
        rows.append((end, row))
    return rows


def _raw_lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while line := file.readline(MOST_CHARACTERS + 1):
            yield line


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "biu":
        return int(array)
    if array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.floating):
        return float(array)
    raise ValueError(f"{name}={value!r}: a metric must be a single real number")


def _text_or_number(name: str, value: Any) -> str | int | float | None:
    if value is None or isinstance(value, str):
        return value
    return _strict(_number(name, value))


def _strict(number: int | float) -> int | float | str:
    return number if math.isfinite(number) else str(number)


def _open_tensorboard(directory: Path, start_step: int) -> Any:
    try:
        import tensorboardX  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise ValueError(
            "tensorboard=True needs tensorboardX: pip install 'rlhf-jax[tensorboard]'"
        ) from error
    # `purge_step` hides what a killed process wrote after its last checkpoint.
    return tensorboardX.SummaryWriter(
        str(directory / "tensorboard"), purge_step=start_step or None
    )


def _open_wandb(directory: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise ValueError(
            "wandb=True needs wandb: pip install 'rlhf-jax[wandb]'"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    id_file = directory / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(
        id=id_file.read_text(encoding="utf-8"),
        name=directory.name,
        dir=os.fspath(directory),
        config=dict(config),
        resume="allow",
    )

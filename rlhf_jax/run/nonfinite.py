"""What a run does after a step whose loss or gradient is not finite."""

import dataclasses
import io
import json
import math
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rlhf_jax.algo.types import (
    Demonstrations,
    Experience,
    Preferences,
    Rankings,
    Sequences,
)
from rlhf_jax.config.run import RunConfig, to_dict
from rlhf_jax.files import typed_fields
from rlhf_jax.files.atomic import remove_temporary, write_atomic
from rlhf_jax.files.bounded_json import parse_json
from rlhf_jax.files.foreign_errors import one_line_errors
from rlhf_jax.files.printable import one_line, shown
from rlhf_jax.files.regular_file import open_regular
from rlhf_jax.learner.finite import NonFiniteError, pop_nonfinite
from rlhf_jax.run.progress import warn
from rlhf_jax.run.remedy import remedy
from rlhf_jax.run.run_directory import RunDirectory

State = TypeVar("State")
Batch = Demonstrations | Preferences | Rankings | Experience
_BATCHES = {x.__name__: x for x in (Demonstrations, Preferences, Rankings, Experience)}

_MOST_BYTES = 2**30  # of the arrays of a dump; some MiB are usual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dump:
    """The batch of a step that failed, on the host.

    Attributes:
        stage: command of the run.
        step: step that failed; the state before it is checkpoint `step − 1`.
        error: what was not finite.
        config: configuration of the run at that step, nested.
        batch: NumPy arrays.
        prompts: the prompt of each row, as in the data; empty if not known.
        vocab_size: of the model.
    """

    stage: str
    step: int
    error: str
    config: dict[str, Any]
    batch: Batch
    prompts: Sequence[str] = ()
    vocab_size: int


class FiniteCheck:
    """Checks each step; undoes and reports those that are not finite.

    Args:
        config: configuration of the run.
        run: its directory.
        rescue: `rescue(step, state)` saves a state, and removes no other checkpoint.
        saved: the steps of all checkpoints.
        counters: numbers that checkpoints include; `optim/skipped` is counted there.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        *,
        rescue: Callable[[int, Any], None],
        saved: Callable[[], list[int]],
        counters: dict[str, float],
    ):
        self._config = config
        self._run = run
        self._rescue = rescue
        self._saved = saved
        self._counters = counters

    @property
    def skipped(self) -> int:
        """Steps that the run has skipped so far."""
        return int(self._counters.get("optim/skipped", 0))

    def __call__(
        self,
        step: int,
        state: State,
        metrics: Mapping[str, Any],
        batch: Batch,
        *,
        vocab_size: int,
        prompts: Sequence[str] = (),
    ) -> tuple[State, dict[str, Any]]:
        """The state and the metrics of a step that is finite, or skipped.

        A step that is not finite leaves a dump of its batch, and a checkpoint of the
        state before it. If it is skipped, only its number advances, and with it the
        random keys; of its metrics, the finite ones remain.

        Args:
            step: number of the step.
            state: state that its update returned.
            metrics: metrics of the update, on the host.
            batch: batch of the update.
            vocab_size: of the model.
            prompts: the prompt of each row.

        Returns:
            The state and metrics without `terms/`.

        Raises:
            NonFiniteError: if a term is not finite and the run must stop, with advice
                on how to continue.
        """
        try:
            return state, pop_nonfinite(metrics, step=step)
        except NonFiniteError as error:
            problem = error
        rescued = self._rescued(step - 1, state)
        dump = Dump(
            stage=self._config.stage,
            step=step,
            error=str(problem),
            config=to_dict(self._config),
            batch=jax.device_get(batch),
            prompts=prompts,
            vocab_size=vocab_size,
        )
        line = f"{problem}. {rescued}{self._kept(dump)}"
        if self._config.on_nonfinite == "stop":
            raise self._stopped(line, step, problem)
        if self.skipped >= self._config.max_skipped:
            line += (
                f". It is not skipped: max-skipped={self.skipped} steps already were"
            )
            raise self._stopped(line, step, problem)
        self._counters["optim/skipped"] = self.skipped + 1
        number = f"{self.skipped} of at most {self._config.max_skipped}"
        warn(f"{line}. The step is skipped ({number})")
        finite = {
            name: value
            for name, value in metrics.items()
            if np.ndim(value) == 0 and math.isfinite(value)
        }
        return _advanced(state), finite

    def _rescued(self, step: int, state: Any) -> str:
        """Saves the state after `step`; says if that fails, as on a full disk."""
        if not self._config.undoes_updates:
            return ""
        try:
            # Its weights may be the cause, and then earlier checkpoints are needed.
            self._rescue(step, state)
        except (OSError, ValueError) as error:
            return f"Checkpoint {step} could not be saved ({one_line(error)}). "
        return ""

    def _kept(self, dump: Dump) -> str:
        """Writes the batch; says where it is, and how to run it."""
        try:
            path = write_dump(self._run, dump)
        except OSError as error:
            return f"Its batch could not be saved ({error.strerror})"
        text = f"Its batch is in {path}"
        if self._config.undoes_updates:
            where = shlex.quote(str(self._run.path))
            command = f"rlhf-jax replay --run-dir {where} --step {dump.step}"
            text += f"; `{command}` runs it alone"
        return text

    def _stopped(self, line: str, step: int, problem: NonFiniteError) -> NonFiniteError:
        """The error that ends the run, with the command to go on."""
        advice = remedy(
            NonFiniteError(line, optimizer_step=problem.optimizer_step),
            step=step,
            stage=self._config.stage,
            run_dir=self._run.path,
            saved=self._saved(),
            rates=self._config.learning_rates(),
        )
        return NonFiniteError(advice, optimizer_step=problem.optimizer_step)


def _advanced(state: Any) -> Any:
    """The state with the number of the next step, so with the keys of that step."""
    step = jax.device_put(state.step + 1, state.step.sharding)
    return dataclasses.replace(state, step=step)


def dump_path(run: RunDirectory, step: int) -> Path:
    """The file with the batch of a step."""
    return run.nonfinite / f"step-{step}.npz"


def write_dump(run: RunDirectory, dump: Dump) -> Path:
    """Writes a dump, atomically; returns its path.

    An .npz with the arrays of the batch by name, such as `chosen/tokens`, and
    everything else as JSON under `about`.
    """
    about = {
        "batch": type(dump.batch).__name__,
        "stage": dump.stage,
        "step": dump.step,
        "error": dump.error,
        "config": dump.config,
        "prompts": list(dump.prompts),
        "vocab_size": dump.vocab_size,
    }
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(dump.batch)
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, about=np.array(json.dumps(about, default=str)), **arrays
    )
    path = dump_path(run, dump.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary(path.parent)  # of a process that was killed
    write_atomic(path, buffer.getvalue())
    return path


def read_dump(run: RunDirectory, step: int) -> Dump:
    """Reads a dump.

    Raises:
        ValueError: there is none of that step, or it cannot be read.
    """
    path = dump_path(run, step)
    if not path.is_file():
        found = ", ".join(map(str, dumped_steps(run))) or "none"
        raise ValueError(f"step={step}: there is no {path}; steps with one: {found}")
    # zipfile, zlib and NumPy raise many kinds of errors.
    with one_line_errors(f"{path} is damaged: replay another --step"):
        arrays = _read_arrays(path)
        about = parse_json(str(arrays.pop("about")), "about", finite=False)
        return _checked(Dump(**about | {"batch": _batch(about["batch"], arrays)}))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with open_regular(path) as handle, zipfile.ZipFile(handle) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"it expands to {size:,} bytes")
        handle.seek(0)
        with np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def _checked(dump: Dump) -> Dump:
    """The dump, after checking the types and shapes of what replay uses."""
    fields = vars(dump)
    typed_fields.text(fields, "stage")
    typed_fields.text(fields, "error")
    typed_fields.section(fields, "config")
    typed_fields.integer(fields, "step")
    typed_fields.integer(fields, "vocab_size")
    arrays = jax.tree.leaves_with_path(dump.batch)
    for path, array in arrays:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = {"tokens": "i", "mask": "b"}.get(re.split("[_/]", name)[-1], "f")
        if array.dtype.kind != kind or array.ndim < 1 + (kind in "ib"):
            raise ValueError(f"{shown(name)} is {array.dtype}{list(array.shape)}")
    rows = {len(array) for _, array in arrays}
    if len(rows) != 1:
        raise ValueError("its arrays have different numbers of rows")
    is_text = isinstance(dump.prompts, list) and all(
        isinstance(prompt, str) for prompt in dump.prompts
    )
    if not is_text or len(dump.prompts) not in (0, *rows):
        raise ValueError(f"its {next(iter(rows))} rows do not each have a prompt")
    return dump


def dumped_steps(run: RunDirectory) -> list[int]:
    """The steps of which there is a dump."""
    names = [path.name for path in run.nonfinite.glob("*.npz")]
    found = [re.fullmatch(r"step-([1-9][0-9]{0,17})\.npz", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def _batch(kind: str, arrays: Mapping[str, Any]) -> Any:
    fields: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        outer, _, inner = name.rpartition("/")
        if outer:
            nested.setdefault(outer, {})[inner] = array
        else:
            fields[name] = array
    fields |= {name: Sequences(**parts) for name, parts in nested.items()}
    return _BATCHES[kind](**fields)

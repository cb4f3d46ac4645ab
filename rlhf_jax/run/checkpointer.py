"""Checkpoints of a training state: atomic, checked, restorable on another mesh."""

import contextlib
import copy
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax

from rlhf_jax.files.atomic import sync_directory
from rlhf_jax.files.printable import one_line
from rlhf_jax.run import checksums
from rlhf_jax.run.checkpoint_leaves import (
    check_same_leaves,
    describe_leaf,
    named_leaves,
    restored_leaf,
    storable,
    target,
)
from rlhf_jax.run.checkpoint_meta import FORMAT, read_meta
from rlhf_jax.run.write_failures import quieten_writer, reason

if TYPE_CHECKING:  # slow to import, and most commands do not need it
    import orbax.checkpoint as ocp

Pytree = Any
Position = dict[str, Any]

_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP = re.compile("0|[1-9][0-9]{0,17}")  # as `save` writes it, and nothing else


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay when a new one is complete.

    Args:
        latest: number of latest ones.
        every: also those of steps that this divides; None: none.
    """

    latest: int = 2
    every: int | None = None

    def superseded(
        self, steps: list[int], values: Mapping[int, Mapping[str, float]]
    ) -> list[int]:
        """The steps that do not stay.

        Args:
            steps: complete checkpoints in order.
            values: step → value by name; the checkpoint with the highest value of each
                name stays.
        """
        stays = set(steps[-self.latest :])
        if self.every is not None:
            stays |= {step for step in steps if step % self.every == 0}
        for name in {name for row in values.values() for name in row}:
            rated = [step for step in steps if name in values.get(step, {})]
            stays |= {max(rated, key=lambda at: values[at][name])}
        return [step for step in steps if step not in stays]


class Checkpointer:
    """Saves and restores `(state, data)` under one directory, one folder per step.

    Only complete checkpoints appear under their number: they are written to a temporary
    directory, which gets checksums of all files, is synced to disk and renamed. A
    killed process leaves at most a temporary directory, which is never listed and is
    removed by the next process's first save.

    `save` returns once the arrays are copied off the devices, so the caller may donate
    them; writing continues in a thread. Use the checkpointer as a context manager (or
    call `close`): leaving it waits for the last commit, and a failed write raises.

    Only one process at a time may write to a directory; `run_lock` sees to that. With
    several JAX processes, every one must call every method in the same order.

    Args:
        directory: directory for the checkpoints of one run; created when needed.
        keep: which checkpoints to keep. The others are removed once a later one is
            complete.

    Raises:
        ValueError: if `keep` would keep none.
    """

    def __init__(self, directory: str | Path, *, keep: Keep | None = None):
        self._keep = keep or Keep()
        if self._keep.latest < 1:
            raise ValueError(f"keep.latest={self._keep.latest}: must be at least 1")
        self._directory = Path(directory).absolute()
        self._writer: ocp.AsyncCheckpointer | None = None
        self._values: dict[int, dict[str, float]] = {}  # of complete checkpoints
        self._saving: int | None = None  # step of a pending write
        self._rotates = False  # whether older checkpoints may be removed

    def save(
        self,
        step: int,
        state: Pytree,
        data: Mapping[str, Any],
        *,
        values: Mapping[str, float] | None = None,
        rescue: bool = False,
    ) -> None:
        """Writes a checkpoint.

        Args:
            step: step number, above that of every earlier checkpoint.
            state: a pytree of arrays, sharded or not; PRNG keys may be typed.
            data: the position in the data, and other small values, as JSON.
            values: the checkpoint with the highest value of each name is kept.
            rescue: the run is about to fail: remove no older checkpoint for this one,
                because its state may be the cause.

        Raises:
            ValueError: if `step` is not above the latest one, or a leaf is no array.
        """
        import orbax.checkpoint as ocp

        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"step {step} cannot be saved in {self._directory}: the latest "
                f"checkpoint is of step {latest}, and steps must increase"
            )
        leaves = named_leaves(state)
        description = {name: describe_leaf(name, leaf) for name, leaf in leaves.items()}
        meta = {
            "format": FORMAT,
            "step": step,
            "leaves": description,
            "data": copy.deepcopy(data),  # written while the caller goes on
            "values": dict(values or {}),
        }
        if self._writer is None:
            self._writer = self._open_writer()
        self._prune()
        self._saving = step
        with self._failing(step):
            self._writer.save(
                self._folder(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(storable(leaves)),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        self._values[step] = meta["values"]
        self._rotates = not rescue

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None; waits for pending writes."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The complete checkpoints in order; waits for pending writes."""
        self.wait()
        if not self._directory.is_dir():
            return []
        names = (path.name for path in self._directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, or None.

        Reads all its files. Those of checkpoints from before checksums are trusted.
        """
        folder = self._folder(step)
        reason = checksums.damage(folder)
        if reason is not None and os.path.lexists(folder / checksums.NAME):
            return reason
        if not (folder / "meta").is_dir():
            return "it is incomplete"
        try:
            meta = read_meta(folder)
        except ValueError as error:
            return one_line(error)
        return None if "format" not in meta else reason

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is not listed any more."""
        self.close()
        folder = self._folder(step)
        aside = folder.with_name(f"damaged-{step}")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # an earlier one of that step
            os.replace(folder, aside)
            sync_directory(self._directory)
        return aside

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, so that new ones can be saved.

        The latest is removed first, so that only complete ones remain if killed.
        """
        later = [number for number in self.steps() if number > step]
        self.close()
        if jax.process_index() != 0:
            return
        for number in reversed(later):
            self._remove(number)

    def data(self, step: int) -> Position:
        """The data of a checkpoint, as passed to `save`, without reading the state.

        Raises:
            ValueError: if it cannot be read.
        """
        return self._meta(step)["data"]

    def rate(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values that were found after `save`, if that checkpoint is complete.

        They decide what this object keeps, and are not written.
        """
        if step in self.steps():
            self._read_values()
            self._values[step] |= values

    def values(self, name: str) -> list[float]:
        """The values of that name in all complete checkpoints."""
        self._read_values()
        return [row[name] for row in self._values.values() if name in row]

    def restore(self, step: int, like: Pytree) -> tuple[Pytree, Position]:
        """Reads a checkpoint; check it with `damage` before.

        Args:
            step: the checkpoint to read, for example `latest_step()`.
            like: the structure to fill: arrays or `jax.ShapeDtypeStruct`s. Each leaf
                gets the sharding of its counterpart, whatever sharding it was saved
                with; without sharding (or for uncommitted arrays) it is uncommitted.

        Returns:
            `(state, data)` as passed to `save`.

        Raises:
            ValueError: if there is no such checkpoint, it cannot be read, or a leaf is
                missing, unexpected, or has a different shape or dtype.
        """
        steps = self.steps()
        if step not in steps:
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory}; "
                f"there are: {steps or 'none'}"
            )
        leaves = named_leaves(like)
        meta = self._meta(step)
        wanted = {name: describe_leaf(name, leaf) for name, leaf in leaves.items()}
        check_same_leaves(meta["leaves"], wanted, self._folder(step))
        stored = self._read_state(step, target(leaves))
        restored = [
            restored_leaf(leaf, stored.get(name), meta["leaves"][name])
            for name, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), restored), meta["data"]

    def wait(self) -> None:
        """Waits until pending writes are committed; raises OSError if they failed."""
        if self._writer is None or self._saving is None:
            return
        with self._failing(self._saving):
            self._writer.wait_until_finished()
            self._saving = None
        if jax.process_index() == 0:
            sync_directory(self._directory)

    def close(self) -> None:
        """Waits for pending writes and removes superseded checkpoints."""
        if self._writer is None:
            return
        try:
            self.wait()
            self._prune()
        finally:
            writer, self._writer = self._writer, None
            writer.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _open_writer(self) -> "ocp.AsyncCheckpointer":
        import orbax.checkpoint as ocp

        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
        # Only a writer may clean up: a reader could remove the checkpoint that a
        # running process is writing.
        self._remove_unfinished(f"*{_UNFINISHED}*")
        self._read_values()
        quieten_writer()

        def finish() -> None:  # in the writing thread, before the rename
            for folder in self._directory.glob(f"{self._saving}{_UNFINISHED}*"):
                checksums.write_checksums(folder)

        options = ocp.options.AsyncOptions(post_finalization_callback=finish)
        return ocp.AsyncCheckpointer(_handler(), async_options=options)

    def _remove_unfinished(self, pattern: str) -> None:
        if jax.process_index() == 0:
            for unfinished in self._directory.glob(pattern):
                shutil.rmtree(unfinished, ignore_errors=True)

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """Says in one line which checkpoint could not be written, and why."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # of TensorStore too
            self._saving = None  # raised once
            self._remove_unfinished(f"{step}{_UNFINISHED}*")
            raise OSError(
                f"checkpoint {step} cannot be written to {self._directory}: "
                f"{reason(error)}; earlier ones are whole. Make room, or mend what is "
                "wrong, then continue with --resume"
            ) from None

    def _read_values(self) -> None:
        for step in self.steps():
            if step not in self._values:
                try:
                    self._values[step] = self._meta(step).get("values", {})
                except ValueError:  # damaged
                    self._values[step] = {}

    def prune(self) -> None:
        """Removes what a killed process left; `save` and `close` do so too."""
        self._remove_unfinished(f"*{_UNFINISHED}*")
        self._read_values()
        self._rotates = True
        self._prune()

    def _prune(self) -> None:
        """Removes superseded checkpoints; the latest one is complete."""
        if self._rotates and jax.process_index() == 0:
            for step in self._keep.superseded(self.steps(), self._values):
                self._remove(step)
        self._values = {step: self._values.get(step, {}) for step in self.steps()}

    def _remove(self, step: int) -> None:
        # Rename to a name that is never listed and that the next save removes.
        hidden = self._directory / f"{step}{_UNFINISHED}"
        shutil.rmtree(hidden, ignore_errors=True)  # left by a killed process
        os.replace(self._folder(step), hidden)
        shutil.rmtree(hidden)

    def _meta(self, step: int) -> dict[str, Any]:
        try:
            return read_meta(self._folder(step))
        except ValueError as error:
            raise self._unreadable(step, error) from None

    def _read_state(self, step: int, target: Pytree) -> Pytree:
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        with ocp.Checkpointer(_handler()) as reader:
            try:
                return reader.restore(self._folder(step), args=args).state
            except (
                *(LookupError, OSError, ValueError, TypeError, AttributeError),
                RecursionError,
            ) as error:
                raise self._unreadable(step, error) from None

    def _unreadable(self, step: int, error: Exception) -> ValueError:
        others = [number for number in self.steps() if number != step]
        return ValueError(
            f"checkpoint {self._folder(step)} is damaged ({one_line(error)}); "
            "remove that directory, and resume from another with --resume-step: "
            f"{others or 'there is none'}"
        )


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
    )

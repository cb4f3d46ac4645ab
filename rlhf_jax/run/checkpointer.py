"""Checkpoints of a training state: atomic, asynchronous, restorable on another mesh."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # slow to import, and most commands do not need it
    import orbax.checkpoint as ocp

Pytree = Any
Position = dict[str, int | float | str]


class Checkpointer:
    """Saves and restores `(state, data)` under one directory, one folder per step.

    Only complete checkpoints appear under their number: Orbax writes into a temporary
    directory, marks it as committed and renames it. A killed process leaves at most a
    temporary directory, which is never listed and is removed by the next process's
    first save.

    `save` returns once the arrays are copied off the devices, so the caller may donate
    them; writing continues in a thread. Use the checkpointer as a context manager (or
    call `close`): leaving it waits for the last commit, and a failed write raises.

    With several processes, every process must call every method in the same order.

    Args:
        directory: directory for the checkpoints of one run; created when needed.
        keep: number of latest checkpoints to keep.

    Raises:
        ValueError: if `keep` is below 1.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep}: must be at least 1")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._writer: ocp.CheckpointManager | None = None

    def save(self, step: int, state: Pytree, data: Mapping[str, int | float | str]):
        """Writes a checkpoint.

        Args:
            step: step number, above that of every earlier checkpoint.
            state: a pytree of arrays, sharded or not; PRNG keys may be typed.
            data: the position in the data, and other small values.

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
        leaves = _named_leaves(state)
        description = {name: _describe(name, leaf) for name, leaf in leaves.items()}
        if self._writer is None:
            # Only a writer may clean up: a reader could remove the checkpoint that a
            # running process is writing.
            self._writer = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep, cleanup_tmp_directories=True
                ),
            )
        self._writer.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_storable(leaves)),
                meta=ocp.args.JsonSave({"leaves": description, "data": dict(data)}),
            ),
            force=True,  # the caller decides when to save
        )

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, or None; waits for pending writes."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The complete checkpoints in order; waits for pending writes."""
        self.wait()
        with self._reader() as reader:
            return sorted(reader.all_steps())

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, so that new ones can be saved.

        The latest is removed first, so that only complete ones remain if killed.
        """
        later = [number for number in self.steps() if number > step]
        self.close()  # a writer uses its cached list
        if jax.process_index() != 0:
            return
        for number in reversed(later):
            # Rename to a name that is never listed and that the next save removes.
            hidden = self._directory / f"{number}.orbax-checkpoint-tmp"
            shutil.rmtree(hidden, ignore_errors=True)  # left by a killed process
            os.replace(self._directory / str(number), hidden)
            shutil.rmtree(hidden)

    def restore(self, step: int, like: Pytree) -> tuple[Pytree, Position]:
        """Reads a checkpoint.

        Args:
            step: the checkpoint to read, for example `latest_step()`.
            like: the structure to fill: arrays or `jax.ShapeDtypeStruct`s. Each leaf
                gets the sharding of its counterpart, whatever sharding it was saved
                with; without sharding (or for uncommitted arrays) it is uncommitted.

        Returns:
            `(state, data)` as passed to `save`.

        Raises:
            ValueError: if there is no such checkpoint, or if a leaf is missing,
                unexpected, or has a different shape or dtype.
        """
        import orbax.checkpoint as ocp

        self.wait()
        leaves = _named_leaves(like)
        with self._reader() as reader:
            if step not in reader.all_steps():
                raise ValueError(
                    f"no checkpoint of step {step} in {self._directory}; "
                    f"there are: {sorted(reader.all_steps()) or 'none'}"
                )
            try:
                meta = reader.restore(
                    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
                ).meta
            except (KeyError, OSError, ValueError) as error:
                others = [n for n in reader.all_steps() if n != step]
                raise ValueError(
                    f"checkpoint {self._directory / str(step)} is damaged "
                    f"({type(error).__name__}); remove that directory, and resume from "
                    f"another with --resume-step: {sorted(others) or 'there is none'}"
                ) from None
            wanted = {name: _describe(name, leaf) for name, leaf in leaves.items()}
            _check_same_leaves(meta["leaves"], wanted, self._directory / str(step))
            stored = reader.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_target(leaves))
                ),
            ).state
        restored = [
            _restored_leaf(leaf, stored.get(name), meta["leaves"][name])
            for name, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), restored), meta["data"]

    def wait(self) -> None:
        """Waits until pending writes are committed; raises if they failed."""
        if self._writer is not None:
            self._writer.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and releases all resources."""
        writer, self._writer = self._writer, None
        if writer is not None:
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

    def _reader(self) -> "ocp.CheckpointManager":
        # A new one each time: it lists what is on disk, whereas a manager that writes
        # also lists the checkpoint it has not committed yet.
        import orbax.checkpoint as ocp

        self._directory.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(
            self._directory, options=ocp.CheckpointManagerOptions(create=False)
        )


def _named_leaves(tree: Pytree) -> dict[str, Any]:
    """Leaves by path, for example `params/actor/kernel`, in tree order.

    Files contain this flat mapping, so they do not depend on the classes of the state,
    and errors can name the leaf.
    """
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(
                f"two leaves of the state are named {name!r}; rename a key"
            )
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"leaf {name!r} of the state is {leaf!r}; a state must contain only arrays"
        )
    description = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        description["key_impl"] = str(jax.random.key_impl(leaf))
    return description


def _storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves for Orbax: keys as integers, without empty arrays (it rejects them)."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in leaves.items()
        if np.prod(leaf.shape) > 0
    }


def _target(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Target shape, dtype and sharding of each stored array."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {}
    for name, leaf in leaves.items():
        if np.prod(leaf.shape) == 0:
            continue
        plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        sharding = _sharding(leaf)
        target[name] = jax.ShapeDtypeStruct(
            plain.shape,
            plain.dtype,
            sharding=default if sharding is None else sharding,
        )
    return target


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf.sharding
    return None


def _restored_leaf(like: Any, stored: Any, description: Mapping[str, Any]) -> jax.Array:
    sharding = _sharding(like)
    if stored is None:
        stored = np.zeros(like.shape, like.dtype)  # empty, so it was not stored
    if sharding is None:
        # Committed to one device, it could not be combined with arrays on a mesh.
        stored = jax.device_put(np.asarray(stored))
    elif not isinstance(stored, jax.Array):
        stored = jax.device_put(stored, sharding)
    if _is_key(like):
        return jax.random.wrap_key_data(stored, impl=description["key_impl"])
    return stored


def _check_same_leaves(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path
) -> None:
    def shown(description: Mapping[str, Any] | None) -> str:
        if description is None:
            return "missing"
        return f"{description['dtype']}{description['shape']}"

    names = list(dict.fromkeys([*wanted, *stored]))
    unequal = [
        name for name in names if shown(stored.get(name)) != shown(wanted.get(name))
    ]
    if unequal:
        name = unequal[0]
        more = f" ({len(unequal) - 1} more leaves differ)" if unequal[1:] else ""
        raise ValueError(
            f"checkpoint {path} has a different state: leaf {name!r} is "
            f"{shown(stored.get(name))} there and {shown(wanted.get(name))} here{more}"
        )

"""One life of a run: the command in a process of its own, killed at a chosen moment.

The process is forked from one that has imported everything but has not started JAX,
which saves most of the start-up. It runs `rlhf_jax.cli.main` with functions wrapped
that tell where it is (the phase) and count what happens there (events): each entry and
exit of a phase, and each call that renames, syncs, creates or removes a file.
"""

import contextlib
import dataclasses
import functools
import importlib
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

# Before NumPy is imported: a process is forked only while it has one thread.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

FILE_CALLS = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")
PRELOADED = (
    *(f"rlhf_jax.recipes.{name}" for name in ("sft", "reward_model", "ppo", "grpo")),
    *("rlhf_jax.cli", "orbax.checkpoint", "rlhf_jax.run.report", "jinja2", "yaml"),
    *("transformers.models.auto.tokenization_auto", "transformers.modeling_rope_utils"),
    *("matplotlib.figure", "matplotlib.backends.backend_svg"),
)
PHASES = (
    *("start-up", "step", "log", "checkpoint write", "checksums", "rename", "prune"),
    *("set aside", "remove after", "cut logs", "best note", "model save", "report"),
)

# Function → phase. Names that another module has imported are wrapped there.
WRAPPED = {
    "rlhf_jax.run.session:Session.log": "log",
    "rlhf_jax.run.session:Session.log_samples": "log",
    "rlhf_jax.run.session:Session._open_logs": "cut logs",
    "rlhf_jax.run.session:write_report": "report",
    "rlhf_jax.run.checkpointer:Checkpointer.save": "checkpoint write",
    "rlhf_jax.run.checkpointer:Checkpointer._prune": "prune",
    "rlhf_jax.run.checkpointer:Checkpointer.set_aside": "set aside",
    "rlhf_jax.run.checkpointer:Checkpointer.remove_after": "remove after",
    "rlhf_jax.run.checksums:write_checksums": "checksums",
    "rlhf_jax.recipes.policy_keeper:write_atomic": "best note",
    "rlhf_jax.recipes.policy_run:save_trained": "model save",
    "rlhf_jax.recipes.supervised_run:save_trained": "model save",
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL `delay` seconds after the `event`-th event of a phase.

    If the phase is not reached within `most` events of any phase, it is killed there.
    """

    phase: str
    event: int
    delay: float = 0.0
    most: int = 1_000_000


class Board:
    """Memory that a killed process leaves to its parent: phase, events per phase."""

    def __init__(self):
        self._memory = mmap.mmap(-1, 4096)

    def set_phase(self, name: str) -> None:
        """Notes where the process is."""
        self._memory[0:1] = bytes([PHASES.index(name)])

    @property
    def phase(self) -> str:
        """Where the process was last."""
        return PHASES[self._memory[0]]

    def count(self, phase: str) -> None:
        """Counts an event."""
        place = slice(8 + 4 * PHASES.index(phase), 12 + 4 * PHASES.index(phase))
        number = int.from_bytes(self._memory[place], "little") + 1
        self._memory[place] = number.to_bytes(4, "little")

    def events(self) -> dict[str, int]:
        """Events by phase."""
        return {
            name: int.from_bytes(self._memory[8 + 4 * i : 12 + 4 * i], "little")
            for i, name in enumerate(PHASES)
        }


class Watch:
    """Tells the phases of this process, and kills it when its time has come."""

    def __init__(self, board: Board, kill: Kill | None):
        self._board = board
        self._kill = kill
        self._left = 0 if kill is None else kill.event
        self._most = 0 if kill is None else kill.most
        self._lock = threading.RLock()
        self._phases = threading.local()  # of each thread
        self._main = threading.get_ident()

    def install(self) -> None:
        """Wraps the functions, once."""
        for name in FILE_CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        for place, phase in WRAPPED.items():
            owner, name = _owner(place)
            setattr(owner, name, self._wrapped(getattr(owner, name), phase))
        owner, name = _owner("rlhf_jax.run.session:Session.restore")
        setattr(owner, name, self._starting(getattr(owner, name)))
        owner, name = _owner("rlhf_jax.run.log_files:_JsonLines._write")
        setattr(owner, name, self._torn(getattr(owner, name)))

    def event(self) -> bool:
        """Counts an event of the current phase; whether it is the last."""
        phase = self._phase
        with self._lock:
            self._board.count(phase)
            if self._kill is None:
                return False
            self._most -= 1
            self._left -= self._kill.phase == phase
            is_it = self._left == 0 or self._most == 0
            self._left = self._left or -1  # once
            return is_it

    def happen(self) -> None:
        """An event."""
        if self.event():
            self.die()

    def die(self) -> None:
        """Kills this process, now or after the delay."""
        assert self._kill is not None
        if self._kill.delay == 0:
            self._board.set_phase(self._phase)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=self._die_later, daemon=True).start()

    def _die_later(self) -> None:
        time.sleep(self._kill.delay)
        os.kill(os.getpid(), signal.SIGKILL)

    @property
    def _phase(self) -> str:
        is_main = threading.get_ident() == self._main
        default = "start-up" if is_main else "checkpoint write"
        return getattr(self._phases, "name", default)

    @_phase.setter
    def _phase(self, name: str) -> None:
        self._phases.name = name
        self._board.set_phase(name)

    @contextlib.contextmanager
    def _during(self, name: str) -> Iterator[None]:
        before = self._phase
        self._phase = name
        self.happen()
        try:
            yield
        finally:
            self.happen()
            self._phase = before

    def _wrapped(self, function: Callable, phase: str) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **options):
            with self._during(phase):
                return function(*args, **options)

        return wrapped

    def _counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args, **options):
            if function.__name__ in ("rename", "replace") and _completes(*args[:2]):
                with self._during("rename"):
                    result = function(*args, **options)
                self._board.set_phase("step")  # the checkpoint is complete
                return result
            self.happen()
            return function(*args, **options)

        return counted

    def _starting(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def restore(*args, **options):
            result = function(*args, **options)
            self._phase = "step"
            return result

        return restore

    def _torn(self, function: Callable) -> Callable:
        """A write that may end in the middle of a line."""

        @functools.wraps(function)
        def write(lines, rows):
            if self.event():
                file = lines._file
                lines._file = _HalfWriter(file, self.die)
            function(lines, rows)

        return write


def _completes(source, target) -> bool:
    """Whether a rename gives a checkpoint its final name."""
    return ".orbax-checkpoint-tmp" in str(source) and Path(target).name.isdecimal()


class _HalfWriter:
    def __init__(self, file, die: Callable[[], None]):
        self._file, self._die = file, die

    def write(self, content: bytes) -> None:
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        self._die()
        self._file.write(content[len(content) // 2 :])

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def _owner(place: str) -> tuple[object, str]:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def preload() -> None:
    """Imports what every life needs; afterwards this process can fork."""
    for name in PRELOADED:
        importlib.import_module(name)
    count = len(os.listdir("/proc/self/task"))
    if count > 1:
        raise RuntimeError(f"{count} threads: the process cannot be forked safely")


def begin(arguments: list[str], kill: Kill | None, log: Path) -> tuple[int, Board]:
    """Starts a life; returns its process and what it leaves."""
    board = Board()
    process = os.fork()
    if process == 0:
        _live(arguments, kill, board, log)
    return process, board


def _live(arguments: list[str], kill: Kill | None, board: Board, log: Path) -> None:
    code = 70
    try:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        Watch(board, kill).install()
        from rlhf_jax import cli

        cli.main(arguments)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(bool(ending.code))
        if isinstance(ending.code, str):  # as Python does
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

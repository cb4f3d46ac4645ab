"""Starts a worker of reward functions, and ends everything that it started.

Runs as a script with only the standard library. The worker is a child of this process,
which runs no user code: it always notices that the run has ended, even while a reward
function never lets go of the interpreter.

On Linux, processes whose parent is gone become children of this one
(`PR_SET_CHILD_SUBREAPER`), so those that a reward function started are found and
killed, even in sessions of their own. If this process is killed, its worker is killed
with it, but what the worker started is not. On other systems only the process group of
the worker is killed.
"""

import contextlib
import ctypes
import importlib.util
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

_PACKAGE = "rlhf_jax"
_IS_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if _IS_LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _defer_package_init() -> None:
    """Makes the modules of this package importable without its `__init__` and jax.

    The worker and reward files import some of them. The `__init__` runs when a name of
    the package itself is accessed.
    """
    found = Path(__file__).parents[1] / "__init__.py"
    spec = importlib.util.spec_from_file_location(_PACKAGE, found)
    assert spec is not None and spec.loader is not None  # it ends in .py
    loader, module = spec.loader, importlib.util.module_from_spec(spec)

    def load_and_get(name: str) -> Any:
        if "__getattr__" not in vars(module):
            raise AttributeError(f"module {_PACKAGE} has no attribute {name}")
        del vars(module)["__getattr__"]
        loader.exec_module(module)
        return getattr(module, name)

    vars(module)["__getattr__"] = load_and_get
    sys.modules[_PACKAGE] = module


def _run_worker(handle: int, supervisor: int) -> NoReturn:
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it ended before that
        os._exit(1)
    _defer_package_init()
    from rlhf_jax.rewards.worker import serve

    with contextlib.suppress(MemoryError):  # outside a call
        serve(handle)
    os._exit(1)


def _descendants(ancestor: int) -> set[int]:
    """The processes below one, from /proc; none on other systems than Linux."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # "pid (name) state parent …"; the name may hold anything.
            parent = int(entry.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found, left = set(), [ancestor]
    while left:
        below = children.get(left.pop(), [])
        found.update(below)
        left += below
    return found


def _kill_all(worker: int, status: int | None) -> int:
    """Kills everything below this process.

    Args:
        worker: process id.
        status: of the worker, if it has ended.

    Returns:
        The status of the worker.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    if status is None:
        os.kill(worker, signal.SIGKILL)  # it may not lead its group yet
    while True:
        for process in _descendants(os.getpid()) if _IS_LINUX else ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            ended, found = os.waitpid(-1, 0)
        except ChildProcessError:
            return status or 0
        if ended == worker:
            status = found


def _wait_for_end(lifeline: int, wake: int, worker: int, run: int) -> int | None:
    """Until the worker or the run has ended; the status of the worker, if it has.

    The run closes its end of `lifeline`; a process that it forked may hold a copy, so
    its process id is looked at too.
    """
    while os.getppid() == run:
        ended = -1
        while ended:  # also what a reward function left behind
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == worker:
                return status
        ready = select.select([lifeline, wake], [], [], 1.0)[0]
        if lifeline in ready:
            return None
        if wake in ready:
            os.read(wake, 4096)
    return None


def main(handle: int, lifeline: int, run: int) -> NoReturn:
    """Runs a worker on the socket `handle`, until `lifeline` closes or `run` ends.

    Exits as the worker did.

    Args:
        handle: file descriptor.
        lifeline: file descriptor.
        run: process id.
    """
    os.set_inheritable(handle, False)
    os.set_inheritable(lifeline, False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.close(lifeline)
        _run_worker(handle, supervisor)
    os.close(handle)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the run decides when this ends
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    status = _kill_all(worker, _wait_for_end(lifeline, wake, worker, run))
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL cannot be ignored
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(supervisor, os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

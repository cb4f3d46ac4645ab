"""A worker process of `functions.py`: loads reward functions and calls them.

Runs as a script with only the standard library: importing this package by name would
load jax, which takes a second in a process that may be replaced at any time.

Messages are plain data over a socket. The worker receives a `Setup`, returns `None` or
an error message, and then receives a `Job` and returns an `Outcome`, until the socket
closes.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

Setup = tuple[list[str], list[str]]  # specs of the functions, and `sys.path`
Job = tuple[int, list[str], list[str], dict[str, list]]  # which function, and its batch
Outcome = list[float | str] | str
"""The score or error of each row, or the error of the whole call."""

RewardFunction = Callable[[list[str], list[str], dict[str, list]], Any]

_LARGEST_SCORE = 3.4e38  # limit of float32
_PACKAGE = "rlhf_jax"


class RewardFunctionError(ValueError):
    """A reward function cannot be loaded, or returned invalid scores."""


def load_reward_function(spec: str) -> RewardFunction:
    """Loads and checks the function that a spec names.

    Imports the file or module in this process. The folder of a file is added to
    `sys.path`, as if the file were run, so that it can import files next to it.

    Args:
        spec: `path/to/file.py:function` or `package.module:function`.

    Returns:
        A callable of `(prompts, responses, columns)`.

    Raises:
        RewardFunctionError: if there is no such file, module or function, importing it
            fails, or it cannot be called with three arguments. One line that begins
            with the spec.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise RewardFunctionError(
            f"{spec}: give a reward as file.py:function or package.module:function"
        )
    is_file = place.endswith(".py")
    path = Path(place).expanduser().resolve()
    if is_file and not path.is_file():
        raise RewardFunctionError(f"{spec}: no such file: {path}")
    try:
        module = _import_file(path) if is_file else importlib.import_module(place)
    except BaseException as error:  # includes SystemExit: a script without a main guard
        raise RewardFunctionError(
            f"{spec}: importing {place} failed: {_described(error)}"
        ) from None
    function = vars(module).get(name)
    if function is None:
        raise RewardFunctionError(f"{spec}: {_no_such_name(module, place, name)}")
    _check_callable(spec, function)
    return function


def _import_file(path: Path) -> ModuleType:
    name = f"reward_file_{path.stem}"  # must not clash with other modules
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _no_such_name(module: ModuleType, place: str, name: str) -> str:
    public = [key for key in vars(module) if not key.startswith("_")]
    near = difflib.get_close_matches(name, public, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{place} has no {name}{hint}"


def _check_callable(spec: str, function: Any) -> None:
    if not callable(function):
        kind = type(function).__name__
        raise RewardFunctionError(f"{spec}: not a function but a value ({kind})")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise RewardFunctionError(
            f"{spec}: an async function or a generator; return a list instead"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind([], [], {})
    except TypeError as error:
        raise RewardFunctionError(
            f"{spec}: it is called as function(prompts, responses, columns) but takes "
            f"{signature}: {error}"
        ) from None


def _described(error: BaseException) -> str:
    """Type and first line of an exception, and the line in the user's file."""
    first_line = (str(error).splitlines() or [""])[0][:200]
    text = f"{type(error).__name__}: {first_line}".removesuffix(": ")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen ")
    ]
    # Deeper frames are libraries, and not informative.
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    where = f" ({Path(frames[0].filename).name}, line {lines[-1]})" if lines else ""
    return text + where


def outcome(function: RewardFunction, job: Job) -> Outcome:
    """Calls the function; converts any result or failure to plain data."""
    _, prompts, responses, columns = job
    try:
        result = function(prompts, responses, columns)
        rows = _plain(result)
        if not isinstance(rows, list | tuple):
            return f"returned {_shown(result)} instead of a list of numbers"
        if len(rows) != len(responses):
            return f"returned {len(rows)} numbers for {len(responses)} responses"
        return [_score(row) for row in rows]
    except BaseException as error:  # includes SystemExit: the worker must continue
        return _described(error)


def _plain(value: Any) -> Any:
    """Converts arrays to lists, and their elements to Python numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _score(row: Any) -> float | str:
    value = _plain(row)
    if not isinstance(value, numbers.Real):
        return f"returned {_shown(value)}, which is not a number"
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not abs(score) <= _LARGEST_SCORE:
        return f"returned {score}, which is not a finite float32"
    return score


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _defer_package_init() -> None:
    """Makes the modules of this package importable without its `__init__` and jax.

    Reward files import `rlhf_jax.tasks.verifiable`. The `__init__` runs when a name of
    the package itself is accessed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.loader is None:
        return
    loader, module = spec.loader, importlib.util.module_from_spec(spec)

    def load_and_get(name: str) -> Any:
        if "__getattr__" not in vars(module):
            raise AttributeError(f"module {_PACKAGE} has no attribute {name}")
        del vars(module)["__getattr__"]
        loader.exec_module(module)
        return getattr(module, name)

    vars(module)["__getattr__"] = load_and_get
    sys.modules[_PACKAGE] = module


def _receive(connection: Connection, messages: queue.SimpleQueue) -> None:
    """Forwards messages; kills the worker and its children when the socket closes.

    Runs in a separate thread, so that a worker whose parent is gone exits even if its
    function never returns. Functions run in the main thread, because `signal.alarm`,
    which they may use for timeouts, only works there.
    """
    try:
        while True:
            messages.put(connection.recv())
    finally:
        os.killpg(0, signal.SIGKILL)


def main(handle: int) -> None:
    """Serves the socket of this file descriptor. The process must be a session
    leader."""
    os.set_inheritable(handle, False)
    connection = Connection(handle)
    messages = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    specs, sys.path[:] = messages.get()
    _defer_package_init()
    try:
        functions = [load_reward_function(spec) for spec in specs]
    except RewardFunctionError as error:
        connection.send(str(error))
    else:
        connection.send(None)
        while True:
            job = messages.get()
            connection.send(outcome(functions[job[0]], job))
    threading.Event().wait()  # until the parent has read the error


if __name__ == "__main__":
    main(int(sys.argv[1]))

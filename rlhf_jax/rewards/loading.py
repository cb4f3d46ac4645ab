"""Imports the reward functions that specs name, and checks them."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

RewardFunction = Callable[[list[str], list[str], dict[str, list]], Any]

_CALLERS = {str(Path(__file__).with_name(name)) for name in ("loading.py", "worker.py")}


class RewardError(ValueError):
    """A reward that the run cannot use."""


class RewardFunctionError(RewardError):
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
            f"{spec}: importing {place} failed: {described(error)}"
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


def described(error: BaseException) -> str:
    """Type and first line of an exception, and the line in the user's file."""
    try:
        first_line = (str(error).splitlines() or [""])[0][:200]
    except BaseException as second:  # of the user's own class
        first_line = f"its text raises {type(second).__name__}"
    text = f"{type(error).__name__}: {first_line}".removesuffix(": ")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (*_CALLERS, importlib.__file__)
        and not frame.filename.startswith("<frozen ")
    ]
    # Deeper frames are libraries, and not informative.
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    where = f" ({Path(frames[0].filename).name}, line {lines[-1]})" if lines else ""
    return text + where

"""The other side of a comparison: its environment, process and turns.

A peer (TRL, `transformers`) needs PyTorch, so it has its own interpreter. The benchmark
is the parent and alternates with it: while one side works, the other waits on a pipe
without using CPU. Standard library only: both sides import this.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REQUIREMENTS = ("torch==2.13.0", "trl==1.12.0")

_HERE = Path(__file__).resolve().parent


def add_python_argument(parser: argparse.ArgumentParser) -> None:
    """`--trl-python PATH`, an interpreter that has `REQUIREMENTS` installed."""
    parser.add_argument(
        "--trl-python",
        type=_existing_file,
        metavar="PATH",
        help=f"interpreter with {' and '.join(REQUIREMENTS)}; default: that of "
        ".venv-trl in the repository, created if missing",
    )


def _existing_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path.absolute()  # not resolved: the link decides which environment it is


def make_environment() -> Path:
    """The interpreter of `.venv-trl`, created if missing."""
    environment = _HERE.parent / ".venv-trl"
    python = environment / "bin" / "python"
    complete = environment / "complete"
    if not complete.is_file():
        print(f"creating {environment} with {' '.join(REQUIREMENTS)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS]
        subprocess.run(install, check=True, stdout=sys.stderr)
        complete.touch()
    return python


class Peer:
    """A peer's process, seen by the parent: `hello`, then a reply per turn."""

    def __init__(self, python: Path, script: str, settings: dict[str, Any]):
        """Starts `script`, a file beside this one, with settings as its argument."""
        self.script = script
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, _HERE / script, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"},
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()  # the peer reads the end of its input, and exits
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def hello(self) -> dict[str, Any]:
        """The peer's description of itself once it is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-20:])
            raise RuntimeError(f"{self.script} stopped; its last output:\n{tail}")
        return json.loads(line)

    def take_turn(self) -> dict[str, Any]:
        """Lets the peer do one unit of work, and waits for its report."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.hello()


class Turns:
    """The same pipe, seen by the peer."""

    def __init__(self):
        """Reserves stdout for reports; prints go to stderr."""
        self._reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def report(self, message: dict[str, Any]) -> None:
        """Sends one message to the parent."""
        self._reports.write(json.dumps(message) + "\n")
        self._reports.flush()

    def wait(self) -> None:
        """Returns when it is this side's turn; exits when there are no more."""
        if not sys.stdin.readline():
            raise SystemExit(0)

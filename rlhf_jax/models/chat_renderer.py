"""Renders chat templates in a process with limits of time, memory and length.

One process renders all conversations of a run, one after the other: a round trip takes
less time than a template. It starts with the first conversation and is replaced when a
template has ended it.
"""

import atexit
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any

from rlhf_jax.models import chat_worker


class _Renderer:
    """The process; starts and restarts as needed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}

    def render(self, source: str, values: Mapping[str, Any]) -> dict[str, str]:
        """The worker's answer."""
        with self._lock:
            is_known = self._process is not None and source in self._known
            number = self._known.setdefault(source, len(self._known))
            job = {"template": number, "values": values}
            job = job if is_known else job | {"source": source}
            line = json.dumps(job).encode("ascii") + b"\n"
            try:
                return self._exchange(line)
            except BaseException:  # Ctrl-C: the next answer would be to this job
                self.stop()
                raise

    def _exchange(self, line: bytes) -> dict[str, str]:
        requests, answers = self._pipes()
        try:
            requests.write(line)
            requests.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            return json.loads(answer)
        process = self._process
        assert process is not None
        code = process.wait()
        self.stop()
        if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
            limit = chat_worker.MOST_SECONDS
            return {"error": f"takes longer than {limit:g} seconds"}
        return {"error": f"ended its process (exit code {code})"}

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process is None:
            self._process = subprocess.Popen(
                # -P: modules next to the script must not shadow libraries.
                [sys.executable, "-P", chat_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # no Ctrl-C
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def stop(self) -> None:
        """Ends the process; the next conversation starts another."""
        process, self._process = self._process, None
        self._known = {}
        if process is not None:
            process.kill()
            process.communicate()


_RENDERER = _Renderer()
atexit.register(_RENDERER.stop)


def render_template(source: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The text of a template, or what is wrong with it.

    Args:
        source: the template, in Jinja.
        values: of its variables; JSON.

    Returns:
        One of `"text"`, `"broken"` (it does not parse: line and problem) and `"error"`
        (it fails, or exceeds a limit).
    """
    return _RENDERER.render(source, values)

"""Runs to break, and the undisturbed one to compare with."""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import lives
import outcomes
import stages

STEPS = 12
LONG = 150  # steps of a run that is interrupted by a signal


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table."""

    seen: str
    code: int
    end: str


class Bench:
    """Runs to break, and the undisturbed one to compare with."""

    def __init__(self, work: Path, other_jax: Path | None):
        self.work, self.other_jax = work, other_jax
        self.reference = work / "reference"
        self.base = work / "base"  # killed after a few checkpoints
        self._number = 0
        self.start(self.reference)
        kill = lives.Kill("rename", 8)
        process, _ = lives.begin(self._arguments(self.base, STEPS), kill, work / "log")
        os.waitpid(process, 0)

    def _arguments(self, run: Path, steps: int, *more: object) -> list[str]:
        given = stages.arguments("sft", self.work, run, steps)
        for option in ("--checkpoint-keep-lowest", "--checkpoint-keep"):  # are new
            without = given.index(option)
            del given[without : without + 2]
        given += ["--resume"] * (run / "config.yaml").exists()
        return [*given, *map(str, more)]

    def copy(self, source: Path | None = None) -> Path:
        """A run to break."""
        self._number += 1
        target = self.work / f"run{self._number}"
        shutil.copytree(source or self.base, target)
        return target

    def empty(self) -> Path:
        """A folder for a new run."""
        self._number += 1
        target = self.work / f"run{self._number}"
        target.mkdir()
        return target

    def start(
        self,
        run: Path,
        *more: object,
        steps: int = STEPS,
        source: Path = stages.ROOT,
        environment: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> tuple[str, int]:
        """Starts or resumes the run; its last line on the terminal, its exit code."""
        ended = subprocess.run(
            stages.command(*self._arguments(run, steps, *more)),
            env=self.environment(source) | (environment or {}),
            cwd=self.work,
            text=True,
            capture_output=True,
            preexec_fn=before,
            check=False,
        )
        return short(ended.stderr, self.work), ended.returncode

    def environment(self, source: Path = stages.ROOT) -> dict[str, str]:
        """Of the command, with the package of a folder."""
        return stages.environment(self.work) | {"PYTHONPATH": str(source)}

    def popen(self, run: Path, *more: object, steps: int) -> subprocess.Popen[str]:
        """Starts a run without waiting for it."""
        line = stages.command(*self._arguments(run, steps, *more))
        return subprocess.Popen(
            line, env=self.environment(), text=True, stderr=subprocess.PIPE
        )

    def ended(self, run: Path, reference: Path | None = None, **options) -> str:
        """Resumes the run; whether it ends as the undisturbed one."""
        line, code = self.start(run, **options)
        if code != 0:
            return f"no: exit code {code}, {line}"
        found = outcomes.differences(run, reference or self.reference)
        return f"no: {found[:3]}" if found else "yes"


def short(text: str, work: Path) -> str:
    """What was printed, in one line; of a traceback the last line and a count."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 8:
        return f"{len(lines)} lines, the last: {lines[-1][:200]}"
    return " / ".join(lines).replace(str(work), "…")[:420]

"""Kills runs at random moments, and compares what they end with to undisturbed runs.

    python tests/torture/run.py --kills 50

For each training command: one undisturbed run, then one that is killed with SIGKILL,
resumed, killed again and so on. Most kills are aimed inside saves, logs and the
report; some come from outside at a random time, some after a SIGTERM. In between, a bit
of the latest checkpoint is flipped, or the run is sent back with --resume-step. The
kills are drawn from a seed; where in a write they land depends on the machine.

After each kill every checkpoint with a final name must be whole, there must be one if
there was one before, and no process may be left. At the end metrics (but for time/),
samples, model and tokenizer must be equal to the undisturbed run's, byte for byte.
"""

import argparse
import collections
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lives
import outcomes
import stages

from rlhf_jax.run.interrupt import RESUMABLE

STEPS = 100
PARALLEL = 2
SECONDS_PER_LIFE = 300
WEIGHTS = {
    "start-up": 2,
    "step": 3,
    "log": 6,
    "checkpoint write": 7,
    "checksums": 6,
    "rename": 5,
    "prune": 6,
    "cut logs": 3,
    "best note": 2,
    "model save": 4,
    "set aside": 3,
    "remove after": 3,
}
OCCURRENCE = {  # events of one, where it does not come with every checkpoint
    "start-up": 15,
    "cut logs": 4,
    "best note": 5,
    "model save": 10,
    "set aside": 10,
    "remove after": 40,
    "report": 6,
}
AT_THE_END = {"model save": 8, "report": 6}  # of 50


class Torture:
    """One run, killed again and again."""

    def __init__(self, stage: str, work: Path, *, kills: int, seed: int):
        self.stage, self.work, self.kills = stage, work, kills
        self.random = random.Random(f"{stage} {seed}")
        self.steps = max(12, STEPS * kills // 50)
        self.reference = work / "reference" / stage
        self.run = work / "killed" / stage
        self.log = work / "killed" / f"{stage}.log"
        self.life = f"{stage}-{os.getpid()}"
        self.phases: collections.Counter[str] = collections.Counter()
        self.lives = 0
        self.faults: list[str] = []
        self.had_one = False
        os.environ[outcomes.LIFE] = self.life

    def arguments(self, run: Path) -> list[str]:
        """The command's, to resume if there is something to resume."""
        given = stages.arguments(self.stage, self.work, run, self.steps)
        if (run / "config.yaml").exists():
            given.append("--resume")
        return given

    def undisturbed(self) -> dict[str, int]:
        """The run to compare with, by the plain command; events of another life."""
        shutil.rmtree(self.reference, ignore_errors=True)
        line = stages.command(*self.arguments(self.reference))
        subprocess.run(line, check=True)
        twin = self.work / "twin" / self.stage
        shutil.rmtree(twin, ignore_errors=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        process, board = lives.begin(self.arguments(twin), None, self.log)
        code = self._end(process)
        self.faults += [f"undisturbed: exit code {code}"] * bool(code)
        found = outcomes.differences(twin, self.reference)
        self.faults += [f"undisturbed, again: {line}" for line in found]
        return board.events()

    def torment(self) -> None:
        """Kills the run until enough is enough, then lets it end."""
        events = self.undisturbed()
        shutil.rmtree(self.run, ignore_errors=True)
        ends = dict(AT_THE_END)
        if self.stage in ("ppo", "grpo"):  # early stopping: the best is saved already
            del ends["model save"]
        weights = {name: x for name, x in WEIGHTS.items() if self._occurs(name, events)}
        at_end = max(1, sum(ends.values()) * self.kills // 50)
        plain = self.kills // 8
        while self.phases.total() < self.kills - at_end and not self._has_ended():
            if self.random.random() * self.kills < plain:
                self._kill_from_outside()
            else:
                self._aim(self._phase(weights), events)
        while self.phases.total() < self.kills:
            self._aim(self._phase(ends), events, in_training=False)
        finish = subprocess.run(stages.command(*self.arguments(self.run)), check=False)
        self.lives += 1
        self.faults += [f"last life: exit code {finish.returncode}"] * bool(
            finish.returncode
        )
        if not self.faults:
            self.faults = outcomes.differences(self.run, self.reference)

    def _occurs(self, phase: str, events: dict[str, int]) -> bool:
        return events[phase] > 0 or phase in ("set aside", "remove after")

    def _has_ended(self) -> bool:
        return (self.run / "report.html").exists()

    def _phase(self, weights: dict[str, int]) -> str:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def _aim(
        self, phase: str, events: dict[str, int], *, in_training: bool = True
    ) -> None:
        """A life that kills itself in a phase, if it gets there."""
        given = self.arguments(self.run)
        is_resumed = "--resume" in given
        saved = sorted(outcomes.complete_checkpoints(self.run))
        if phase == "set aside" and not (
            is_resumed and outcomes.damage_latest(self.run)
        ):
            phase = "checkpoint write"
        if phase == "remove after":
            if is_resumed and len(saved) > 1:
                given += ["--resume-step", str(self.random.choice(saved[:-1]))]
            else:
                phase = "prune"
        saves = self.steps // 2
        highest = OCCURRENCE.get(phase, max(2, 2 * events[phase] // saves))
        delay = self.random.choice([0.0, self.random.uniform(0, 0.02)])
        most = events["start-up"] + 4 * sum(events.values()) // saves
        most = most if in_training else 1_000_000
        kill = lives.Kill(phase, self.random.randint(1, highest), delay, most)
        process, board = lives.begin(given, kill, self.log)
        code = self._end(process)
        self._account(code, board.phase)

    def _kill_from_outside(self) -> None:
        """A life that is killed at a random time, half of them after a SIGTERM."""
        given = self.arguments(self.run)
        is_plain = self.random.random() < 0.5
        softly = self.random.random() < 0.5
        begun = time.monotonic()
        if is_plain:  # the real command, not a fork of this process
            with self.log.open("ab") as log:
                line = stages.command(*given)
                started = subprocess.Popen(line, stdout=log, stderr=log)
            process, board = started.pid, None
        else:
            process, board = lives.begin(given, None, self.log)
        self._wait_for_progress(begun, self.random.uniform(0.0, 3.0))
        # Not yet waited for, so the number is still that of our process.
        if softly:
            os.kill(process, signal.SIGTERM)
            time.sleep(self.random.uniform(0.0, 0.1))
        os.kill(process, signal.SIGKILL)
        code = self._end(process)
        where = "any" if board is None else board.phase
        self._account(code, f"outside: {where}")

    def _wait_for_progress(self, begun: float, seconds: float) -> None:
        """Waits until the run is in its loop, then for the given time."""
        launches, limit = self.run / "launches.jsonl", begun + 60
        while time.monotonic() < limit:
            if launches.exists() and launches.stat().st_mtime > time.time() - (
                time.monotonic() - begun
            ):
                break
            time.sleep(0.01)
        time.sleep(seconds)

    def _end(self, process: int) -> int:
        """Waits for the process; its exit code, negative for a signal."""
        limit = time.monotonic() + SECONDS_PER_LIFE
        while time.monotonic() < limit:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        self.faults.append(f"hung for {SECONDS_PER_LIFE} s")
        return 0

    def _account(self, code: int, phase: str) -> None:
        """What must hold after every life."""
        self.lives += 1
        if code == -signal.SIGKILL:
            self.phases[phase] += 1
        elif code not in (0, -signal.SIGTERM, RESUMABLE):
            self.faults.append(
                f"life {self.lives}: exit code {code}; {_tail(self.log)}"
            )
        left = outcomes.wait_until_alone(self.life)
        self.faults += [f"life {self.lives}: left {line}" for line in left]
        found = outcomes.complete_checkpoints(self.run)
        whole = [step for step, wrong in found.items() if wrong is None]
        if self.had_one and not whole:
            self.faults.append(f"life {self.lives}: no complete checkpoint")
        wrong = {step: why for step, why in found.items() if why is not None}
        if len(wrong) > 1 or (wrong and max(wrong) < max(whole, default=0)):
            self.faults.append(f"life {self.lives}: {wrong}")
        self.had_one |= bool(whole)
        if len(self.faults) > 20:
            raise SystemExit(f"{self.stage}: {self.faults}")


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines()
    return lines[-1] if lines else ""


def one_stage(stage: str, options: argparse.Namespace) -> None:
    """Tortures one command; writes a row of the table."""
    begun = time.monotonic()
    lives.preload()
    torture = Torture(stage, options.work, kills=options.kills, seed=options.seed)
    torture.torment()
    row = {
        "stage": stage,
        "kills": torture.phases.total(),
        "phases": dict(torture.phases.most_common()),
        "lives": torture.lives,
        "steps": torture.steps,
        "seconds": round(time.monotonic() - begun),
        "faults": torture.faults,
    }
    outcomes.write_result(options.work / "results.jsonl", row)


def table(rows: list[dict]) -> str:
    """A Markdown table of the results."""
    names = [name for name in lives.PHASES if any(_of(row, name) for row in rows)]
    names += ["any"] if any(_of(row, "any") for row in rows) else []
    head = ["command", "kills", *names, "starts", "minutes", "result"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        result = "equal" if not row["faults"] else f"{len(row['faults'])} faults"
        cells = [row["stage"], row["kills"], *(_of(row, name) for name in names)]
        cells += [row["lives"], f"{row['seconds'] / 60:.1f}", result]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _of(row: dict, name: str) -> int:
    """Kills in a phase, aimed at or not."""
    return row["phases"].get(name, 0) + row["phases"].get(f"outside: {name}", 0)


def every_stage(options: argparse.Namespace) -> list[dict]:
    """Tortures the commands, two at a time; the rows of the table."""
    results = options.work / "results.jsonl"
    results.unlink(missing_ok=True)
    stages.prepare(options.work, models=options.stage != ["sft"])
    waiting, running = list(options.stage), []
    while waiting or running:
        while waiting and len(running) < PARALLEL:
            line = [sys.executable, __file__, "--one", "--work", str(options.work)]
            line += ["--stage", waiting.pop(0), "--kills", str(options.kills)]
            line += ["--seed", str(options.seed)]
            environment = stages.environment(options.work)
            running.append(subprocess.Popen(line, env=environment))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.1)
    rows = results.read_text("utf-8").splitlines() if results.exists() else []
    return [json.loads(row) for row in rows]


def main() -> None:
    """The command line; exits with 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=stages.STAGES)
    parser.add_argument("--kills", type=int, default=50, help="per command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to work in; kept")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.stage = options.stage or list(stages.STAGES)
    if options.one:
        one_stage(options.stage[0], options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.work = (options.work or Path(temporary)).absolute()
        rows = every_stage(options)
    print(f"seed {options.seed}, {platform.machine()}, {os.cpu_count()} cores")
    print(table(rows))
    for row in rows:
        for fault in row["faults"]:
            print(f"{row['stage']}: {fault}")
    if len(rows) < len(options.stage) or any(row["faults"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""A long run of a tiny model by the real command: does anything grow?

    python tests/torture/endurance.py --updates 10000 --picture docs/endurance.png

Runs `rlhf-jax ppo` with a reward function, a checkpoint and an evaluation every 100
updates, in this process. Every 20 updates it notes the memory of the process and of its
reward worker, open files, threads, live arrays on the device, compilations, and the
sizes of the files; at the end it measures the report and the start of a resumed run.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import stages

EVERY = 20
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
PANELS = {
    "Memory, MB": ["process MB", "reward worker MB"],
    "On the device": ["arrays", "arrays KB"],
    "Open files, threads": ["open files", "threads"],
    "Compilations": ["compilations"],
    "Files, MB": ["metrics MB", "samples MB", "checkpoints MB"],
    "Seconds per 20 updates": ["seconds"],
}


def arguments(work: Path, updates: int) -> list[str]:
    """A run whose updates take milliseconds."""
    options = {
        "run-dir": work / "run",
        "policy": work / "start" / "model",
        "data": work / "ppo.jsonl",
        "reward": f"{stages.ROOT / 'tests' / 'letter_rewards.py'}:brevity",
        "reward-processes": 1,
        "updates": updates,
        "batch-size": 4,
        "epochs": 1,
        "minibatches": 1,
        "max-new-tokens": 4,
        "eval-fraction": 0.2,
        "eval-prompts": 4,
        "eval-every": 100,
        "checkpoint-every": 100,
        "kl.target": 0.5,
        "scores.normalization": "running",
        "early-stop": "eval/score_mean",
        "early-stop-patience": 1_000_000,
    }
    return ["ppo", "--quiet", *stages.flags(options)]


def resident(process: int | str) -> float:
    """Megabytes that a process occupies."""
    pages = int(Path(f"/proc/{process}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> list[int]:
    """Processes that this one has started."""
    found = Path("/proc/self/task").glob("*/children")
    return [int(number) for path in found for number in path.read_text().split()]


def megabytes(path: Path) -> float:
    """Size of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size / 1e6
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # was just renamed or removed
                total += os.stat(os.path.join(folder, name)).st_size
    return total / 1e6


class Sampler:
    """Notes the state of this process, as the run logs its updates."""

    def __init__(self, run: Path):
        import jax

        self.rows: list[dict[str, float]] = []
        self._run, self._jax = run, jax
        self._compilations = 0
        self._begun = time.monotonic()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        self._compilations += event == COMPILE_EVENT

    def note(self, step: int) -> None:
        """One row."""
        arrays, now = self._jax.live_arrays(), time.monotonic()
        names = ("metrics", "samples")
        row = {
            "step": step,
            "process MB": resident("self"),
            "reward worker MB": sum(map(resident, children())),
            "arrays": len(arrays),
            "arrays KB": sum(array.nbytes for array in arrays) / 1e3,
            "open files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "compilations": self._compilations,
            "checkpoints MB": megabytes(self._run / "checkpoints"),
            "seconds": now - self._begun,
        }
        row |= {f"{x} MB": megabytes(self._run / f"{x}.jsonl") for x in names}
        self.rows.append(row)
        self._begun = time.monotonic()


def watched(work: Path, updates: int) -> tuple[list[dict[str, float]], dict]:
    """Runs the command; returns the rows, and what the report took."""
    from rlhf_jax import cli
    from rlhf_jax.run import session

    sampler = Sampler(work / "run")
    ends: dict[str, float] = {}
    log, write_report = session.Session.log, session.write_report

    def logged(self, step, metrics, *, shown):
        log(self, step, metrics, shown=shown)
        if step % EVERY == 0:
            sampler.note(step)

    def timed(*args, **options):
        before, begun = resident("self"), time.monotonic()
        path = write_report(*args, **options)
        ends["report, seconds"] = time.monotonic() - begun
        ends["report, memory added, MB"] = resident("self") - before
        ends["report, MB"] = megabytes(path)
        return path

    session.Session.log, session.write_report = logged, timed
    begun = time.monotonic()
    cli.main(arguments(work, updates))
    ends["run, seconds"] = time.monotonic() - begun
    session.Session.log, session.write_report = log, write_report
    return sampler.rows, ends


def resumed(work: Path, updates: int) -> dict[str, float]:
    """Seconds of what a resumed run reads at its start, by function."""
    from rlhf_jax.run import log_files

    begun = time.monotonic()
    rows = log_files.read_metrics(work / "run" / "metrics.jsonl")
    seconds = time.monotonic() - begun
    with log_files.MetricsWriter(
        work / "run" / "metrics.jsonl", start_step=updates + 1
    ):
        opened = time.monotonic() - begun - seconds
    return {
        "rows of metrics": len(rows),
        "reading metrics.jsonl, seconds": seconds,
        "opening metrics.jsonl, seconds": opened,
    }


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """The picture: a panel for each kind of number."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).ravel()
    steps = [row["step"] for row in rows]
    for panel, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            values = [row[name] for row in rows]
            panel.plot(steps, values, label=name, linewidth=1)
        panel.set_title(title, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[3:]:
        panel.set_xlabel("update")
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--picture", type=Path, help="PNG to write")
    parser.add_argument("--rows", type=Path, help="JSON lines to write")
    parser.add_argument("--work", type=Path, help="folder to work in; kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        os.environ |= stages.environment(work)
        sys.path.insert(0, str(stages.ROOT))
        stages.prepare(work)
        rows, ends = watched(work, options.updates)
        ends |= resumed(work, options.updates)
    early, late = rows[len(rows) // 5], rows[-1]
    print(f"{'':>20} {'update ' + str(early['step']):>14} {late['step']:>10}")
    for name in late:
        print(f"{name:>20} {early[name]:>14.4g} {late[name]:>10.4g}")
    print(json.dumps({name: round(x, 3) for name, x in ends.items()}))
    if options.rows:
        lines = (json.dumps(row) + "\n" for row in rows)
        options.rows.write_text("".join(lines), "utf-8")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()

"""A table of faults: what was seen, and whether the run ends as if nothing had been.

    python tests/torture/faults.py
    python tests/torture/faults.py --other-jax FOLDER

Each row breaks a short `sft` run in one way, starts the command, and resumes the run
once the cause is gone. FOLDER holds another version of jax and jaxlib, from
`pip install --no-deps --target FOLDER jax==… jaxlib==…`. Full disks and read-only
folders need the right to mount (Linux, root); their rows are left out otherwise.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lives
import outcomes
import stages
from bench import LONG, Bench, Row, short

NO_CHECKSUMS = "7f97130"  # the last commit that wrote none
ROWS: dict[str, Callable[[Bench], Row | None]] = {}


def row(name: str):
    """Adds a function to the table."""

    def add(function):
        ROWS[name] = function
        return function

    return add


def _largest(run: Path) -> Path:
    """The largest file of the latest checkpoint."""
    folder = run / "checkpoints" / str(max(outcomes.complete_checkpoints(run)))
    return max(folder.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


@contextmanager
def mounted(target: Path, *options: str) -> Iterator[None]:
    """A mount for the duration of the block."""
    subprocess.run(["mount", *options, str(target)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


def _tmpfs(kilobytes: int) -> tuple[str, ...]:
    return ("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs")


def _enlarge(target: Path) -> None:
    line = ["mount", "-o", "remount,size=64m", str(target)]
    subprocess.run(line, check=True)


def _kilobytes(folder: Path) -> int:
    """Space of a folder on a tmpfs, in whole pages."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4 for path in files)


@row("disk full while a checkpoint is written")
def full_at_checkpoint(bench: Bench) -> Row:
    run = bench.empty()
    latest = max(outcomes.complete_checkpoints(bench.base))
    one = _kilobytes(bench.base / "checkpoints" / str(latest))
    with mounted(run, *_tmpfs(int(2.5 * one))):
        line, code = bench.start(run)
        _enlarge(run)
        return Row(line, code, bench.ended(run))


@row("disk full while the model is saved")
def full_at_model(bench: Bench) -> Row:
    run, whole = bench.empty(), bench.copy(bench.reference)
    shutil.rmtree(whole / "model")
    (whole / "report.html").unlink()
    with mounted(run, *_tmpfs(_kilobytes(whole) + 60)):
        shutil.copytree(whole, run, dirs_exist_ok=True)
        line, code = bench.start(run)
        _enlarge(run)
        return Row(line, code, bench.ended(run))


@row("metrics.jsonl cannot grow (file size limit)")
def full_at_metrics(bench: Bench) -> Row:
    run = bench.copy()
    size = (run / "metrics.jsonl").stat().st_size + 100

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    # Programs would be too large for the limit.
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    line, code = bench.start(
        run, "--checkpoint-every", 1000, before=limit, environment=off
    )
    return Row(line, code, bench.ended(run))


@row("read-only run directory, at a start")
def read_only_new(bench: Bench) -> Row:
    run = bench.empty()
    with mounted(run, "--bind", str(run)):
        _make_read_only(run)
        line, code = bench.start(run)
    return Row(line, code, bench.ended(run))


@row("read-only run directory, at a resume")
def read_only(bench: Bench) -> Row:
    run = bench.copy()
    with mounted(run, "--bind", str(run)):
        _make_read_only(run)
        line, code = bench.start(run)
    return Row(line, code, bench.ended(run))


def _make_read_only(run: Path) -> None:
    line = ["mount", "-o", "remount,bind,ro", str(run)]
    subprocess.run(line, check=True)


def _damaged(bench: Bench, damage: Callable[[Path], None]) -> Row:
    run = bench.copy()
    damage(_largest(run))
    line, code = bench.start(run)
    found = outcomes.differences(run, bench.reference)
    return Row(line, code, f"no: {found[:3]}" if found else "yes")


@row("a bit of the latest checkpoint flipped")
def flipped(bench: Bench) -> Row:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return _damaged(bench, flip)


@row("a file of the latest checkpoint truncated")
def truncated(bench: Bench) -> Row:
    return _damaged(bench, lambda path: path.write_bytes(path.read_bytes()[:-100]))


@row("a file of the latest checkpoint lost")
def lost(bench: Bench) -> Row:
    return _damaged(bench, lambda path: path.unlink())


@row("every checkpoint damaged")
def all_damaged(bench: Bench) -> Row:
    run = bench.copy()
    for step in outcomes.complete_checkpoints(run):
        for path in (run / "checkpoints" / str(step)).glob("state/**/d/*"):
            path.write_bytes(path.read_bytes()[:-1])
    line, code = bench.start(run)
    return Row(line, code, "no, and says so")


@row("a run of an older version, without checksums")
def older(bench: Bench) -> Row | None:
    source = bench.work / "older"
    source.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(stages.ROOT), "archive", NO_CHECKSUMS, "rlhf_jax"],
        capture_output=True,
        check=False,
    )
    if archive.returncode != 0:
        return None
    subprocess.run(["tar", "x", "-C", str(source)], input=archive.stdout, check=True)
    run = bench.empty() / "run"
    bench.start(run, source=source)
    _take_back(run)
    line, code = bench.start(run)
    found = outcomes.differences(run, bench.reference)
    return Row(line, code, f"no: {found[:3]}" if found else "yes")


def _take_back(run: Path) -> None:
    """Leaves the earliest checkpoint, and nothing that came after the last one."""
    saved = sorted(int(x.name) for x in (run / "checkpoints").glob("[0-9]*"))
    for step in saved[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    shutil.rmtree(run / "model")
    (run / "report.html").unlink()


@row("saved on 1 device, resumed on 4 (data 2 × fsdp 2)")
def to_mesh(bench: Bench) -> Row:
    run = bench.copy()
    line, code = bench.start(run, *_MESH, environment=_DEVICES)
    return Row(line, code, _distance(run, bench.reference))


@row("saved on 4 devices, resumed on 1")
def from_mesh(bench: Bench) -> Row:
    run = bench.empty() / "run"
    bench.start(run, *_MESH, environment=_DEVICES)
    _take_back(run)
    line, code = bench.start(run)
    return Row(line, code, _distance(run, bench.reference))


_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
_MESH = ("--mesh.data", 2, "--mesh.fsdp", 2)


def _distance(run: Path, reference: Path) -> str:
    """How far the metrics are from those of the undisturbed run."""
    found = outcomes.differences(run, reference)
    if not found:
        return "yes, bit-exact"
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    other = (reference / "metrics.jsonl").read_text().splitlines()
    largest = 0.0
    for ours, theirs in zip(rows, map(json.loads, other), strict=True):
        for name, value in theirs.items():
            if not name.startswith("time/") and value:
                largest = max(largest, abs(ours[name] - value) / abs(value))
    return f"to rounding: metrics differ by at most {largest:.0e} relative"


@row("saved with this jax, resumed with another")
def other_jax(bench: Bench) -> Row | None:
    if bench.other_jax is None:
        return None
    run = bench.copy()
    paths = f"{bench.other_jax}:{stages.ROOT}"
    line, code = bench.start(run, environment={"PYTHONPATH": paths})
    return Row(line, code, _distance(run, bench.reference) if code == 0 else "no")


@row("a second process on the same run")
def second(bench: Bench) -> Row:
    run = bench.empty() / "run"
    first = _running(bench, run)
    line, code = bench.start(run, steps=LONG)
    first.communicate()
    return Row(line, code, _long_end(bench, run))


def _running(bench: Bench, run: Path) -> subprocess.Popen[str]:
    """A long run that has logged a few steps."""
    process = bench.popen(run, steps=LONG)
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > 5:
            break
        time.sleep(0.005)
    return process


def _long_end(bench: Bench, run: Path) -> str:
    reference = bench.work / "long"
    if not reference.exists():
        bench.start(reference, steps=LONG)
    return bench.ended(run, reference, steps=LONG)


def _signalled(bench: Bench, *numbers: int) -> Row:
    run = bench.empty() / "run"
    process = _running(bench, run)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    _, error = process.communicate()
    line = short(error, bench.work)
    return Row(line, process.returncode, _long_end(bench, run))


@row("SIGTERM")
def sigterm(bench: Bench) -> Row:
    return _signalled(bench, signal.SIGTERM)


@row("SIGTERM twice")
def sigterm_twice(bench: Bench) -> Row:
    return _signalled(bench, signal.SIGTERM, signal.SIGTERM)


@row("Ctrl-C")
def sigint(bench: Bench) -> Row:
    return _signalled(bench, signal.SIGINT)


@row("Ctrl-C twice")
def sigint_twice(bench: Bench) -> Row:
    return _signalled(bench, signal.SIGINT, signal.SIGINT)


def main() -> None:
    """The command line; exits with 1 if a traceback was seen or a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other-jax", type=Path, help="folder with another jax")
    parser.add_argument("--only", nargs="+", help="rows with one of these texts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ |= stages.environment(work)
        stages.prepare(work, models=False)
        lives.preload()
        bench = Bench(work, options.other_jax)
        print(
            "| fault | seen | exit code | ends as if undisturbed |\n|---|---|---|---|"
        )
        wrong = 0
        for name, function in ROWS.items():
            if options.only and not any(text in name for text in options.only):
                continue
            try:
                found = function(bench)
            except subprocess.CalledProcessError as error:
                found = Row(f"not tried: {error}", 0, "–")
            if found is not None:
                seen = found.seen.replace("|", "¦")
                print(f"| {name} | {seen} | {found.code} | {found.end} |", flush=True)
                wrong += found.end.startswith("no:") or "lines, the last" in seen
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()

"""What a run leaves, compared with an undisturbed one, and what a killed one leaves."""

import json
import os
import time
from pathlib import Path

from rlhf_jax.run import checksums
from rlhf_jax.run.log_files import read_metrics

LIFE = "TORTURE_LIFE"  # environment variable of the processes of one run


def differences(run: Path, reference: Path) -> list[str]:
    """What differs in the results of two runs: columns of metrics, names of files."""
    found = []
    ours, theirs = (_metrics(path / "metrics.jsonl") for path in (run, reference))
    if len(ours) != len(theirs):
        found.append(f"metrics.jsonl has {len(ours)} rows, not {len(theirs)}")
    for row, other in zip(ours, theirs, strict=False):
        names = [name for name in row | other if row.get(name) != other.get(name)]
        found += [f"step {other['step']}: {name}" for name in names]
    names = {"samples.jsonl", "best.json"}
    for folder in ("model", "tokenizer"):
        for root in (run, reference):
            files = (root / folder).rglob("*")
            names |= {str(path.relative_to(root)) for path in files if path.is_file()}
    found += [
        name for name in sorted(names) if _read(run, name) != _read(reference, name)
    ]
    return found + _leftovers(run, reference)


def _metrics(path: Path) -> list[dict[str, str]]:
    """Every value as text, so that NaN equals itself; without durations."""
    return [
        {name: repr(x) for name, x in row.items() if not name.startswith("time/")}
        for row in read_metrics(path)
    ]


def _read(run: Path, name: str) -> bytes | None:
    path = run / name
    return path.read_bytes() if path.is_file() else None


def _leftovers(run: Path, reference: Path) -> list[str]:
    """Files and checkpoints that an undisturbed run does not leave."""
    found = []
    for folder in (".", "checkpoints"):
        ours, theirs = (
            {path.name for path in (root / folder).iterdir()}
            for root in (run, reference)
        )
        found += [
            f"{folder}/{name} is " + ("left over" if name in ours else "missing")
            for name in sorted(ours ^ theirs)
            if not name.startswith("damaged-")
        ]
    return found


def complete_checkpoints(run: Path) -> dict[int, str | None]:
    """Step → what is wrong with its files, for everything that has a final name."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return {}
    found = (path for path in folder.iterdir() if path.name.isdecimal())
    return {int(path.name): checksums.damage(path) for path in found}


def damage_latest(run: Path) -> bool:
    """Flips a bit of the latest checkpoint, if there is one before it."""
    steps = sorted(complete_checkpoints(run))
    if len(steps) < 2:
        return False
    folder = run / "checkpoints" / str(steps[-1])
    path = max(folder.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return True


def wait_until_alone(life: str, seconds: float = 20.0) -> list[str]:
    """Processes of the run that are still there, once they have had time to end."""
    end = time.monotonic() + seconds
    while True:
        found = _processes(life)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.01)


def _processes(life: str) -> list[str]:
    mark, found = f"{LIFE}={life}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes().split(b"\0"):
                status = (path / "stat").read_text("utf-8").rpartition(")")[2].split()
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if int(path.name) != os.getpid() and status[0] not in "ZX":
                    found.append(f"{path.name}: {line}")
        except OSError:  # gone, or of another user
            continue
    return found


def write_result(path: Path, result: dict) -> None:
    """Appends one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")

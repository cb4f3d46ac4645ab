"""The files of one run.

config.yaml     the resolved configuration, for `--config`
launches.jsonl  per start of the run: time, command line, versions, devices, process
metrics.jsonl   one line of metrics per step
samples.jsonl   prompts with responses, if the stage samples
checkpoints/    for `--resume` and `--resume-step`
tokenizer/      of an SFT run from scratch: the tokenizer trained on its texts
nonfinite/      batches of steps with a NaN or infinite loss, for `rlhf-jax replay`
model/          the trained model, as a Hugging Face directory
adapter/        of a LoRA run: only the adapters, in PEFT's format
report.html     report with all charts and samples
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from rlhf_jax.config.run import FREE_ON_RESUME, load_yaml
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.files.bounded_json import parse_json
from rlhf_jax.files.bounded_lines import read_lines

_PACKAGES = (
    "rlhf-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Paths in a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def launches(self) -> Path:
        """One JSON line per start of the run."""
        return self.path / "launches.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON line per prompt and response."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """Directory of the tokenizer that an SFT run trained."""
        return self.path / "tokenizer"

    @property
    def nonfinite(self) -> Path:
        """Directory of the batches of steps that were not finite."""
        return self.path / "nonfinite"

    @property
    def model(self) -> Path:
        """Directory of the trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """Directory of the trained adapters in PEFT's format."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    def read_config(self) -> dict[str, Any]:
        """The stored configuration; empty if there is none."""
        if not self.config.exists():
            return {}
        return load_yaml(self.config)

    def read_launches(self) -> list[dict[str, Any]]:
        """All starts of the run, in order."""
        if not self.launches.exists():
            return []
        return [
            parse_json(line, f"{self.launches}, line {number}")
            for number, line in read_lines(self.launches)
        ]


def check_run(
    path: str | Path,
    config: Mapping[str, Any],
    *,
    stage: str,
    resume: bool = False,
    free_on_resume: Sequence[str] = FREE_ON_RESUME,
) -> None:
    """Raises what `open_run` would raise, but writes nothing; same arguments."""
    if jax.process_index() != 0:
        return
    run, plain = RunDirectory(Path(path)), _plain(config, "")
    if resume:
        _check_resumable(run, plain, stage, free_on_resume)
    else:
        _check_unused(run)


def open_run(
    path: str | Path,
    config: Mapping[str, Any],
    *,
    stage: str,
    resume: bool = False,
    free_on_resume: Sequence[str] = FREE_ON_RESUME,
) -> RunDirectory:
    """Creates the directory of a new run, or opens that of a run to resume.

    Only process 0 checks and writes. A run that was stopped before its first checkpoint
    can be resumed too: it starts over.

    Args:
        path: the run directory, created when needed.
        config: the resolved configuration, nested; plain values and paths.
        stage: the training command, for example `"ppo"`.
        resume: resume the run in `path` instead of starting one.
        free_on_resume: fields (dotted; a section includes all its fields) that may
            change on resume.

    Raises:
        ValueError: if `path` already contains a run and `resume` is not set; if it is
            set and there is no run, or one with another configuration or stage; or if a
            value of `config` is not a plain one.
    """
    run = RunDirectory(Path(path))
    if jax.process_index() != 0:
        return run
    options: dict[str, Any] = {"resume": resume, "free_on_resume": free_on_resume}
    check_run(path, config, stage=stage, **options)
    plain = _plain(config, "")
    run.path.mkdir(parents=True, exist_ok=True)
    launches = [*run.read_launches(), _launch(stage)]
    write_atomic(run.launches, "".join(json.dumps(row) + "\n" for row in launches))
    # Last, because a directory with a configuration is considered a run.
    write_atomic(run.config, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    return run


def _check_unused(run: RunDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise ValueError(f"--run-dir {run.path} is a file; give a directory")
    traces = (run.config, run.metrics, run.samples, run.checkpoints, run.model)
    traces += (run.adapter,)
    found = [trace.name for trace in traces if trace.exists()]
    if found:
        raise ValueError(
            f"--run-dir {run.path} already contains a run ({', '.join(found)}); choose "
            "another --run-dir, or pass --resume to continue it"
        )


def _check_resumable(
    run: RunDirectory, config: dict[str, Any], stage: str, free_on_resume: Sequence[str]
) -> None:
    if not run.config.exists():
        raise ValueError(
            f"nothing to resume in --run-dir {run.path}: it has no config.yaml; "
            "check the path, or start without --resume"
        )
    launches = run.read_launches()
    if launches and launches[0]["stage"] != stage:
        raise ValueError(
            f"cannot resume --run-dir {run.path} as {stage}: it contains a run of "
            f"{launches[0]['stage']}"
        )
    stored, given = _flat(run.read_config()), _flat(config)
    unequal = [
        f"{name} was {_shown(stored, name)} and is now {_shown(given, name)}"
        for name in dict.fromkeys([*stored, *given])
        if _shown(stored, name) != _shown(given, name)
        and not any(
            name == free or name.startswith(f"{free}.") for free in free_on_resume
        )
    ]
    if unequal:
        raise ValueError(
            f"cannot resume --run-dir {run.path}: {'; '.join(unequal)}; use the stored "
            "values, or choose another --run-dir"
        )


def _plain(value: Any, name: str) -> Any:
    """The value as YAML reads it back, for comparison with stored values."""
    if isinstance(value, Mapping):
        return {
            str(key): _plain(inner, f"{name}.{key}" if name else str(key))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"{name}={value!r}: a configuration has text, numbers, lists and sections, "
        f"not {type(value).__name__}"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "not set"


def _launch(stage: str) -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    return {
        "stage": stage,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "process": os.getpid(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # for example run from a source tree

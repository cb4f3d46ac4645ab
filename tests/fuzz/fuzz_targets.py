"""What is fuzzed: a reader, its seeds, and what may come of any input.

Either it is read, or it is refused with a `ValueError` of one short printable line; any
other exception, a long message or a slow answer is a finding.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from files.hostile_fields import ADAPTERS, CONFIGS, GENERATION, GPT2, INDEXES, LLAMA
from files.hostile_rows import ROWS, TEMPLATES, YAML

from rlhf_jax import cli
from rlhf_jax.config.run import load_yaml
from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.data.annotation import read_key
from rlhf_jax.data.row_files import read_rows
from rlhf_jax.data.text_data import read_examples
from rlhf_jax.files.printable import printable
from rlhf_jax.models.chat_renderer import render_template
from rlhf_jax.models.families import read_config
from rlhf_jax.models.hf.generation_config import read_eos_ids
from rlhf_jax.models.hf.peft_config import CONFIG, read_peft_config
from rlhf_jax.models.hf.safetensors_files import INDEX, SINGLE, open_tensors

MOST_SECONDS = 10.0
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ALPHAS = {"q_proj": 3, r".*layers\.\d+\.mlp": 5}


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader of one file."""

    file: str
    read: Callable[[Path], object]
    seeds: list[bytes]


def _seeds(*found: object) -> list[bytes]:
    """Those that are short: mutations of long ones are slow and find less."""
    made = [x if isinstance(x, str | bytes) else json.dumps(x) for x in found]
    encoded = [x.encode() if isinstance(x, str) else x for x in made]
    return [x for x in encoded if 0 < len(x) < 2000]


def _tensors(path: Path) -> None:
    with open_tensors(path) as tensors:
        for name in tensors.file_of:
            tensors.shape(name)
            if tensors.dtype(name) in ("F32", "BF16", "F16", "I64", "BOOL"):
                tensors.view(name)


def _template(path: Path) -> None:
    source = (path / "x.jinja").read_text("utf-8", errors="replace")
    answer = render_template(source, {"messages": MESSAGES, "bos_token": "<s>"})
    assert len(answer) == 1 and answer.keys() <= {"text", "broken", "error"}
    assert "ended its process" not in answer.get("error", "")


def _header(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


_ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
_SCALE = {"labels": [], "lowest": 1, "highest": 5}
_KEY = {
    "kind": "ranking",
    "scale": _SCALE,
    "tasks": {"1": {"prompt": "p", "answers": ["a", "b"], "order": [1, 0]}},
}

TARGETS = {
    "config": Target(
        "config.json", read_config, _seeds(*CONFIGS.values(), GPT2, LLAMA)
    ),
    "generation": Target(
        "generation_config.json", read_eos_ids, _seeds(*GENERATION.values())
    ),
    "adapter": Target(
        CONFIG,
        lambda path: read_peft_config(path).scale("model.layers.0.mlp.up_proj", 2),
        _seeds(
            *ADAPTERS.values(),
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": ALPHAS},
        ),
    ),
    "index": Target(INDEX, _tensors, _seeds(*INDEXES.values())),
    "tensors": Target(
        SINGLE, _tensors, _seeds(_header({"x": _ENTRY}), _header({"__metadata__": {}}))
    ),
    "rows": Target(
        "a.jsonl",
        lambda path: list(read_rows(path / "a.jsonl")),
        _seeds(*ROWS.values()),
    ),
    "examples": Target(
        "a.jsonl",
        lambda path: read_examples(path / "a.jsonl", on_unusable="drop"),
        _seeds(*ROWS.values(), {"prompt": "a", "completion": "b"}),
    ),
    "yaml": Target(
        "a.yaml",
        lambda path: cli.flags_from(
            SFTConfig, load_yaml(path / "a.yaml"), where=str(path)
        ),
        _seeds(*YAML.values(), "data: a\noptimizer:\n  learning_rate: 1.0e-4\n"),
    ),
    "annotations": Target(
        "a.csv.key.json", lambda path: read_key(path / "a.csv"), _seeds(_KEY)
    ),
    "template": Target(
        "x.jinja",
        _template,
        # Without those that only fill their time or memory.
        [x for x in _seeds(*TEMPLATES.values()) if b"99" not in x and b"**" not in x],
    ),
}


class Finding(AssertionError):
    """An input that was neither read nor refused as it should be."""


class Runner:
    """Runs one target on inputs, in a directory of its own."""

    def __init__(self, name: str):
        self._target = TARGETS[name]
        memory = Path("/dev/shm")
        self._holder = tempfile.TemporaryDirectory(
            dir=memory if memory.is_dir() else None
        )
        self._path = Path(self._holder.name)

    def __call__(self, data: bytes) -> None:
        """Raises `Finding` if the input is one."""
        (self._path / self._target.file).write_bytes(data)
        begin = time.monotonic()
        try:
            self._target.read(self._path)
        except ValueError as error:
            message = str(error)
            is_line = printable(message) == message and 0 < len(message) <= 450
            if type(error) is not ValueError or not is_line:
                raise Finding(f"{type(error).__name__}: {message[:500]!r}") from error
        except Exception as error:
            raise Finding(f"{type(error).__name__}: {error}") from error
        seconds = time.monotonic() - begin
        if seconds > MOST_SECONDS:
            raise Finding(f"took {seconds:.1f} s")

    def close(self) -> None:
        """Removes the directory."""
        self._holder.cleanup()

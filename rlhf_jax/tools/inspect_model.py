"""`rlhf-jax inspect`: describes a model and the memory that each stage needs."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from rlhf_jax.config.inspection import InspectConfig
from rlhf_jax.data.tokenization import Tokenization
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families import SCORE, Family, read_config
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.models.hf.safetensors_files import open_tensors
from rlhf_jax.models.hf.tensor_layout import parameter_shapes
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.run.devices import make_mesh
from rlhf_jax.run.progress import heading, say
from rlhf_jax.tools.memory_plan import StageMemory, stage_memory

EXAMPLE = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model as described by its files.

    Attributes:
        directory: directory of the files.
        adapter: directory of adapters on that model, if one was given.
        config: shape of the model.
        head: `"lm"`, or `"reward"` for a sequence classifier.
        num_parameters: parameters of trunk and head.
        stored: parameters in the files by dtype, as named by safetensors; empty if
            there are no weights.
        num_files: number of safetensors files.
        tokenization: the tokenizer, or None.
        missing: why there are no weights or no tokenizer, one line each.
    """

    directory: Path
    adapter: Path | None
    config: DecoderConfig
    head: str
    num_parameters: int
    stored: dict[str, int]
    num_files: int
    tokenization: Tokenization | None
    missing: tuple[str, ...]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Stop tokens."""
        return () if self.tokenization is None else self.tokenization.stop_ids(())

    @property
    def pad_id(self) -> int:
        """Padding token; 0 without a tokenizer."""
        return 0 if self.tokenization is None else self.tokenization.pad_id

    @property
    def special_tokens(self) -> dict[str, tuple[str, int]]:
        """Name → text and id of the special tokens."""
        if self.tokenization is None:
            return {}
        tokenizer = self.tokenization.tokenizer
        names = ("bos", "eos", "pad", "unk")
        found = {}
        for name in names:
            text = getattr(tokenizer, f"{name}_token")
            if text is not None:
                found[name] = (str(text), int(getattr(tokenizer, f"{name}_token_id")))
        return found

    @property
    def rendered(self) -> str | None:
        """A short conversation in the chat template, or None without one."""
        if (
            self.tokenization is None
            or self.tokenization.tokenizer.chat_template is None
        ):
            return None
        return self.tokenization.render(EXAMPLE, add_generation_prompt=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "directory": str(self.directory),
            "adapter": None if self.adapter is None else str(self.adapter),
            "family": self.config.family,
            "head": self.head,
            "layers": self.config.num_layers,
            "width": self.config.width,
            "heads": self.config.num_heads,
            "kv_heads": self.config.num_kv_heads,
            "head_dim": self.config.head_dim,
            "mlp_width": self.config.mlp_width,
            "vocabulary": self.config.vocab_size,
            "context": self.config.max_positions,
            "sliding_window": self.config.sliding_window,
            "tied": self.config.tie_embeddings,
            "parameters": self.num_parameters,
            "stored": self.stored,
            "files": self.num_files,
            "special_tokens": {
                name: {"text": text, "id": number}
                for name, (text, number) in self.special_tokens.items()
            },
            "stop_ids": list(self.stop_ids),
            "chat_template": self.rendered is not None,
            "rendered": self.rendered,
            "missing": list(self.missing),
        }


def read_facts(path: str) -> ModelFacts:
    """Reads configuration, headers and tokenizer; weights or tokenizer may be missing.

    Args:
        path: directory, or Hub name.

    Raises:
        ValueError: there is no `config.json` of a supported family.
    """
    checkpoint = open_checkpoint(path, weights=False)
    family, config = read_config(checkpoint.directory)
    missing = []
    stored: Counter[str] = Counter()
    files, head = 0, "lm"
    try:
        stored, files, head = _read_headers(checkpoint.directory, family, config)
    except ValueError as error:
        missing.append(f"weights: {error}")
    tokenization = None
    try:
        tokenization = Tokenization.load(checkpoint.directory)
    except ValueError as error:
        missing.append(f"tokenizer: {error}")
    module = Transformer(config, head="reward" if head == "reward" else "lm")
    shapes = parameter_shapes(module)
    return ModelFacts(
        directory=checkpoint.directory,
        adapter=checkpoint.adapter,
        config=config,
        head=head,
        num_parameters=sum(math.prod(leaf.shape) for leaf in shapes.values()),
        stored=dict(stored),
        num_files=files,
        tokenization=tokenization,
        missing=tuple(missing),
    )


def _read_headers(
    directory: Path, family: Family, config: DecoderConfig
) -> tuple[Counter[str], int, str]:
    """Parameters by dtype, files, and the head."""
    stored: Counter[str] = Counter()
    with open_tensors(directory) as tensors:
        for name in tensors.file_of:
            stored[tensors.dtype(name)] += math.prod(tensors.shape(name))
        is_bare = config.tie_embeddings or family.lm_head.name not in tensors.file_of
        is_classifier = SCORE.name in tensors.file_of and is_bare
        files = len(set(tensors.file_of.values()))
    return stored, files, "reward" if is_classifier else "lm"


def run(config: InspectConfig) -> None:
    """Prints both, or JSON.

    Raises:
        ValueError: the directory cannot be read, or sizes are invalid.
    """
    config.validate()
    facts = read_facts(config.model)
    _check_lengths(config, facts)
    told = Console(stderr=True)
    mesh, is_simulated = simulated_mesh(config.mesh.data, config.mesh.fsdp)
    if not config.json:
        say("\n".join(describe(facts)))
    stages = [
        stage_memory(
            config.of_stage(stage),
            facts.config,
            mesh,
            stop_ids=facts.stop_ids,
            pad_id=facts.pad_id,
            compile_programs=config.compile,
            report=lambda text: heading(text, console=told),
        )
        for stage in config.stages
    ]
    where = f"{mesh.devices.flat[0].device_kind}"
    if config.json:
        memory = [to_dict(stage) for stage in stages]
        devices = {"kind": where, "number": mesh.size, "simulated": is_simulated}
        result = {"model": facts.to_dict(), "devices": devices, "memory": memory}
        say(json.dumps(result, indent=2))
        return
    simulated = ", simulated" if is_simulated else ""
    say(f"\nMemory per device, of {mesh.size} ({where}{simulated}):")
    for stage in stages:
        say("\n" + "\n".join(table(stage)))
    if config.compile:
        say("\nPlans depend on the device and the XLA version.")


def simulated_mesh(data: int, fsdp: int) -> tuple[Mesh, bool]:
    """A mesh of local devices, or of simulated CPU devices if there are too few.

    In that case, JAX is restarted, and all arrays on devices are lost.
    """
    if data * fsdp <= len(jax.devices()):
        return make_mesh(data=data, fsdp=fsdp), False
    from jax.extend import backend

    backend.clear_backends()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", data * fsdp)
    return make_mesh(data=data, fsdp=fsdp), True


def describe(facts: ModelFacts) -> list[str]:
    """The model in a few lines."""
    config = facts.config
    tied = "tied" if config.tie_embeddings else "own"
    rows = {
        "model": str(facts.directory),
        "family": f"{config.family}, "
        + {"lm": "language model", "reward": "one score (reward model or critic)"}[
            facts.head
        ],
        "layers": f"{config.num_layers}, width {config.width:,}, "
        f"feed-forward {config.mlp_width:,}",
        "heads": f"{config.num_heads} of {config.head_dim}, "
        f"{config.num_kv_heads} for keys and values",
        "vocabulary": f"{config.vocab_size:,}, output matrix {tied}",
        "context": f"{config.max_positions:,} tokens",
        "parameters": f"{facts.num_parameters:,}",
    }
    if facts.adapter is not None:
        rows["model"] += f", base of the adapter {facts.adapter}"
    if config.sliding_window is not None:
        rows["context"] += f", windows of {config.sliding_window:,}"
    if facts.stored:
        kinds = " + ".join(f"{n:,} {dtype}" for dtype, n in facts.stored.items())
        plural = "" if facts.num_files == 1 else "s"
        rows["stored"] = f"{kinds} in {facts.num_files} file{plural}"
    if facts.special_tokens:
        rows["special"] = ", ".join(
            f"{name} {text!r} = {number}"
            for name, (text, number) in facts.special_tokens.items()
        )
        rows["stops at"] = ", ".join(map(str, facts.stop_ids))
        has_none = facts.rendered is None
        rows["chat"] = "no template" if has_none else "template; for example"
    lines = [f"{name:<11} {value}" for name, value in rows.items()]
    if facts.rendered is not None:
        lines += [f"  | {line}" for line in facts.rendered.splitlines()]
    return lines + [f"no {line}" for line in facts.missing]


def table(stage: StageMemory) -> list[str]:
    """A stage's memory, line by line, and the sum."""
    rows: list[tuple[str, int | None, str]] = [
        (name, size, "") for name, size in stage.resident.items()
    ]
    for program in stage.programs:
        parts = [f"{name} {show(size)}" for name, size in program.parts.items()]
        parts.append(f"temporary {show(program.rest)}")
        parts.append(f"data {show(program.batch + program.results)}")
        rows.append((f"+ {program.name}", program.total, ", ".join(parts)))
    if not stage.programs:
        rows.append(("+ gradients", stage.gradients, "without activations"))
        if stage.cache:
            rows.append(("+ KV cache", stage.cache, "of a rollout"))
    largest = "" if stage.programs else "at least"
    rows.append(("peak", stage.peak, largest))
    return [f"{stage.stage}"] + [
        f"  {name:<20}{show(size):>10}  {note}".rstrip() for name, size, note in rows
    ]


def to_dict(stage: StageMemory) -> dict[str, Any]:
    """Plain values, in bytes per device."""
    return dataclasses.asdict(stage) | {"always": stage.always, "peak": stage.peak}


def show(size: int | None) -> str:
    """Bytes in decimal units."""
    assert size is not None
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.{2 if size < 100 * scale else 0}f} {unit}"
    return f"{size / 1e3:,.1f} kB" if size >= 1000 else f"{size} B"


def _check_lengths(config: InspectConfig, facts: ModelFacts) -> None:
    """Raises ValueError if the model does not support sequences of these lengths."""
    for stage in config.stages:
        options = vars(config.of_stage(stage))
        why, needed = "max-tokens", options.get("max_tokens")
        if needed is None:
            why = "max-prompt-tokens + max-new-tokens"
            needed = options["max_prompt_tokens"] + options["max_new_tokens"]
        limit = facts.config.max_positions
        if needed > limit:
            raise ValueError(
                f"{why} of {stage}: {needed} tokens, but the model supports at most "
                f"{limit} (its max_positions); lower the limits"
            )

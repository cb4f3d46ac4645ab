"""`rlhf-jax inspect`: what a model is, and the memory that each stage would take."""

import dataclasses
import json
import sys
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from rlhf_jax.recipes.inspect_config import InspectConfig
from rlhf_jax.recipes.memory_plan import StageMemory, stage_memory
from rlhf_jax.recipes.model_facts import ModelFacts, read_facts
from rlhf_jax.runtime.mesh import make_mesh
from rlhf_jax.runtime.progress import heading


def run(config: InspectConfig) -> None:
    """Prints both, or JSON.

    Raises:
        ValueError: on a directory that cannot be read, or sizes that cannot work.
    """
    config.validate()
    facts = read_facts(config.model)
    _check_lengths(config, facts)
    told = Console(stderr=True)
    mesh, is_simulated = simulated_mesh(config.mesh.data, config.mesh.fsdp)
    if not config.json:
        print("\n".join(describe(facts)), flush=True)
    stages = [
        stage_memory(
            stage,
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
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    simulated = ", simulated" if is_simulated else ""
    print(f"\nMemory per device, of {mesh.size} ({where}{simulated}):")
    for stage in stages:
        print("\n" + "\n".join(table(stage)))
    if config.compile:
        print("\nOther kinds of devices and other versions of XLA plan differently.")


def simulated_mesh(data: int, fsdp: int) -> tuple[Mesh, bool]:
    """A mesh of this machine's devices, or, where they are too few, of CPU devices.

    Starts JAX anew in that case: nothing on the devices survives it.
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
    """Bytes, readable: decimal units."""
    assert size is not None
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.{2 if size < 100 * scale else 0}f} {unit}"
    return f"{size / 1e3:,.1f} kB" if size >= 1000 else f"{size} B"


def _check_lengths(config: InspectConfig, facts: ModelFacts) -> None:
    """Raises ValueError where the model cannot read sequences of these lengths."""
    for stage in config.stages:
        options = vars(config.of_stage(stage))
        why, needed = "max-tokens", options.get("max_tokens")
        if needed is None:
            why = "max-prompt-tokens + max-new-tokens"
            needed = options["max_prompt_tokens"] + options["max_new_tokens"]
        limit = facts.config.max_positions
        if needed > limit:
            raise ValueError(
                f"{why} of {stage}: {needed} tokens, but the model reads at most "
                f"{limit} (its max_positions); lower the limits"
            )

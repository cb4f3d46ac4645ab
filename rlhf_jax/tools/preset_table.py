"""Every option in every preset, as a table or as a file for `--config`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rlhf_jax.algo.options import check
from rlhf_jax.config.grpo import GRPOMethod
from rlhf_jax.config.grpo_presets import GRPO_PRESETS
from rlhf_jax.config.ppo import PPOMethod
from rlhf_jax.config.ppo_presets import PPO_PRESETS
from rlhf_jax.config.run import to_dict
from rlhf_jax.config.tools import PresetsConfig
from rlhf_jax.run.progress import say


def run(config: PresetsConfig) -> None:
    """Prints the table, or one preset as YAML."""
    if config.preset is None:
        say(table(config.command or "ppo"))
        return
    import yaml

    presets = {
        "ppo": PPO_PRESETS,
        "grpo": GRPO_PRESETS,
        None: PPO_PRESETS | GRPO_PRESETS,
    }
    method = to_dict(find_preset(config.preset, presets[config.command]))
    say(yaml.safe_dump(method, sort_keys=False, allow_unicode=True).rstrip())


def find_preset(name: str, presets: Mapping[str, Callable[[], Any]]) -> Any:
    """The preset with this name.

    Raises:
        ValueError: there is none.
    """
    check(name in presets, "preset", name, f"expected one of {', '.join(presets)}")
    return presets[name]()


def table(command: Literal["ppo", "grpo"]) -> str:
    """Options × presets in Markdown; values that differ from the default are bold."""
    presets, default = PPO_PRESETS, flat(PPOMethod())
    if command == "grpo":
        presets, default = GRPO_PRESETS, flat(GRPOMethod())
    columns = [flat(make()) for make in presets.values()]
    lines = [
        "| option | default | " + " | ".join(presets) + " |",
        "|" + "---|" * (2 + len(presets)),
    ]
    for option, value in default.items():
        cells = [
            _show(column[option])
            if column[option] == value
            else f"**{_show(column[option])}**"
            for column in columns
        ]
        lines.append(f"| `{option}` | {_show(value)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flat(options: Any, prefix: str = "") -> dict[str, Any]:
    """Options by flag name."""
    found = {}
    for field in dataclasses.fields(options):
        value = vars(options)[field.name]
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)

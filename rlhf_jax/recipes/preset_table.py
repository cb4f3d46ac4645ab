"""Every option of PPO in every preset, as a table or as a file for `--config`."""

import dataclasses
from typing import Any

from rlhf_jax.presets import PRESETS, PPOMethod, preset
from rlhf_jax.recipes.tool_configs import PresetsConfig
from rlhf_jax.runtime.config import to_dict


def run(config: PresetsConfig) -> None:
    """Prints the table, or one preset as YAML."""
    if config.preset is None:
        print(table())
        return
    import yaml

    method = to_dict(preset(config.preset))
    print(yaml.safe_dump(method, sort_keys=False, allow_unicode=True), end="")


def table() -> str:
    """Options × presets in Markdown; what differs from our default is in bold."""
    default = flat(PPOMethod())
    columns = [flat(make()) for make in PRESETS.values()]
    lines = [
        "| option | default | " + " | ".join(PRESETS) + " |",
        "|" + "---|" * (2 + len(PRESETS)),
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
    """Options by the name of their flag."""
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

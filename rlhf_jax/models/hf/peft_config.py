"""Reads and writes PEFT's `adapter_config.json`, and rejects what is not supported."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.models.lora import LoraOptions

CONFIG = "adapter_config.json"
# These change the base model's matrices, so the adapter alone is not enough.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "megatron_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "alora_invocation_tokens",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The parsed configuration of an adapter.

    Attributes:
        base: name or path of the base model.
        is_classifier: whether the base is a sequence classifier.
        rank: default rank of modules.
        alpha: likewise.
        alpha_pattern: regular expression for the end of a module's name → its alpha.
        rslora: alpha is divided by the root of the rank.
        dropout: in training.
    """

    base: str
    is_classifier: bool
    rank: int
    alpha: float
    alpha_pattern: dict[str, float]
    rslora: bool
    dropout: float

    def scale(self, module: str, rank: int) -> float:
        """The scale of B A for a module with this rank."""
        found = [
            alpha
            for pattern, alpha in self.alpha_pattern.items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        ]
        alpha = found[0] if found else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def is_adapter(path: str | Path) -> bool:
    """Whether a directory has an adapter and no full model.

    A `config.json` next to the adapter, which some trainers copy there, does not count
    as a model.
    """
    path = Path(path)
    is_whole = any(path.glob("model*.safetensors"))
    return (path / CONFIG).is_file() and not is_whole


def read_peft_config(path: Path) -> PeftConfig:
    """Reads `adapter_config.json`.

    Raises:
        ValueError: if there is no such file, or it is not plain LoRA.
    """
    file = path / CONFIG
    try:
        fields = json.loads(file.read_text("utf-8"))
        config = PeftConfig(
            base=_joined(fields.get("base_model_name_or_path"), fields.get("revision")),
            is_classifier=fields.get("task_type") == "SEQ_CLS",
            rank=int(fields["r"]),
            alpha=float(fields["lora_alpha"]),
            alpha_pattern=dict(fields.get("alpha_pattern") or {}),
            rslora=bool(fields.get("use_rslora")),
            dropout=float(fields.get("lora_dropout") or 0.0),
        )
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; give a PEFT adapter") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not a LoRA configuration: {error!r}") from None
    try:
        _check_plain(fields)
        _check_patterns(config.alpha_pattern)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def _joined(base: str | None, revision: str | None) -> str:
    """Joins name and revision into `name@revision`."""
    is_name = base and revision and not Path(base).exists()
    return f"{base}@{revision}" if is_name else base or ""


def _base_fields(base: str) -> dict[str, str | None]:
    """Fields for the base: an absolute directory, or name and revision."""
    if Path(base).exists():
        base, revision = str(Path(base).resolve()), ""
    else:
        base, _, revision = base.partition("@")
    return {"base_model_name_or_path": base, "revision": revision or None}


def _check_patterns(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"alpha_pattern has {pattern!r}, which is not a regular expression: "
                f"{error}"
            ) from None


def _check_plain(fields: dict[str, Any]) -> None:
    """Raises ValueError naming the first field that is not plain LoRA."""
    for name, allowed in (
        ("peft_type", ("LORA",)),
        ("task_type", (None, "CAUSAL_LM", "SEQ_CLS")),
        ("bias", (None, "none")),
        ("init_lora_weights", _KEEPS_BASE),
    ):
        if fields.get(name) not in allowed:
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}={fields.get(name)!r} is not supported: {known}")
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise ValueError(
                f"{name}={fields[name]!r} is not supported: plain LoRA only"
            )
    saved = set(fields.get("modules_to_save") or ()) - {"score", "classifier"}
    if saved:
        raise ValueError(
            f"modules_to_save={sorted(saved)} is not supported: only score can be "
            "fully trained"
        )


def peft_fields(
    options: LoraOptions,
    *,
    base: str,
    is_classifier: bool,
    targets: list[str],
    joined: dict[str, int],
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The fields of `adapter_config.json`.

    Args:
        options: of the adapters.
        base: name or path of the base model.
        is_classifier: whether it is a sequence classifier, with a trained score head.
        targets: name suffixes of adapted modules.
        joined: modules with several of our adapters → how many.
        fan_in_fan_out: whether matrices are stored `[in, out]`.
    """

    def number(x: float) -> int | float:
        return int(x) if x == int(x) else x

    root = math.sqrt if options.rslora else float
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
        **_base_fields(base),
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": number(options.alpha),
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(targets),
        "modules_to_save": ["score"] if is_classifier else None,
        # n times the rank with the same scale.
        "rank_pattern": {name: n * options.rank for name, n in joined.items()},
        "alpha_pattern": {
            name: number(root(n) * options.alpha) for name, n in joined.items()
        },
    }

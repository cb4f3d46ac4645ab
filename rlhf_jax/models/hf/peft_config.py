"""`adapter_config.json` as PEFT writes it: what it says, and what is refused."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.models.lora import LoraOptions

CONFIG = "adapter_config.json"
# These start from other matrices than the base model's; the adapter alone is no use.
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
    """What an adapter's configuration says about its numbers.

    Attributes:
        base: name or path of the model that is adapted.
        is_classifier: whether that is a sequence classifier.
        rank: of modules without one of their own.
        alpha: likewise.
        alpha_pattern: regular expression of the end of a module's name → its alpha.
        rslora: alpha is divided by the root of the rank.
        dropout: of the training.
    """

    base: str
    is_classifier: bool
    rank: int
    alpha: float
    alpha_pattern: dict[str, float]
    rslora: bool
    dropout: float

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A of a module with a rank."""
        found = [
            alpha
            for pattern, alpha in self.alpha_pattern.items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        ]
        alpha = found[0] if found else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter and no whole model.

    A `config.json` beside the adapter, which some trainers copy there, is none.
    """
    path = Path(path)
    is_whole = any(path.glob("model*.safetensors"))
    return (path / CONFIG).is_file() and not is_whole


def read_peft_config(path: Path) -> PeftConfig:
    """Reads `adapter_config.json`.

    Raises:
        ValueError: no such file, or it describes something other than plain LoRA.
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
        raise ValueError(f"{file}: {error.strerror}; name PEFT's directory") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no configuration of LoRA: {error!r}") from None
    try:
        _check_plain(fields)
        _check_patterns(config.alpha_pattern)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def _joined(base: str | None, revision: str | None) -> str:
    """Name and revision as one, as the other commands take them."""
    is_name = base and revision and not Path(base).exists()
    return f"{base}@{revision}" if is_name else base or ""


def _base_fields(base: str) -> dict[str, str | None]:
    """A directory as it is found from anywhere; of a name, the revision apart."""
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
                f"alpha_pattern has {pattern!r}, which is no regular expression: "
                f"{error}"
            ) from None


def _check_plain(fields: dict[str, Any]) -> None:
    """Raises ValueError naming the first field that asks for more than LoRA."""
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
            f"modules_to_save={sorted(saved)} is not supported: of what is trained in "
            "full, only score"
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
        base: name or path of the model that is adapted.
        is_classifier: whether it is a sequence classifier, with a trained score vector.
        targets: ends of the names of adapted modules.
        joined: those whose adapter is made of several of ours → of how many.
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
        # n times the rank, under the same factor.
        "rank_pattern": {name: n * options.rank for name, n in joined.items()},
        "alpha_pattern": {
            name: number(root(n) * options.alpha) for name, n in joined.items()
        },
    }

"""Reads and writes PEFT's `adapter_config.json`, and rejects what is not supported."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from rlhf_jax.files.bounded_json import read_object
from rlhf_jax.files.printable import shown
from rlhf_jax.files.regular_file import model_file
from rlhf_jax.files.typed_fields import flag, integer, number, section, text
from rlhf_jax.models.hf.module_patterns import ModulePatterns
from rlhf_jax.models.lora import LoraOptions

CONFIG = "adapter_config.json"
MOST_RANK = 2**16
_MOST_CHARACTERS = 250  # no file system has longer names
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
        alpha_pattern: the alpha of modules that have their own.
        rslora: alpha is divided by the root of the rank.
        dropout: in training.
    """

    base: str
    is_classifier: bool
    rank: int
    alpha: float
    alpha_pattern: ModulePatterns
    rslora: bool
    dropout: float

    def scale(self, module: str, rank: int) -> float:
        """The scale of B A for a module with this rank."""
        found = self.alpha_pattern.find(module)
        alpha = self.alpha if found is None else found
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def is_adapter(path: str | Path) -> bool:
    """Whether a directory has an adapter and no full model.

    A `config.json` next to the adapter, which some trainers copy there, does not count
    as a model.
    """
    path = Path(path)
    is_whole = any(path.glob("model*.safetensors"))
    return (path / CONFIG).exists() and not is_whole


def read_peft_config(path: Path) -> PeftConfig:
    """Reads `adapter_config.json`.

    Raises:
        ValueError: if there is no such file, or it is not plain LoRA.
    """
    file = path / CONFIG
    if not file.exists():
        raise ValueError(f"{file}: no such file; give a PEFT adapter")
    fields = read_object(model_file(path, CONFIG))
    try:
        _check_plain(fields)
        ranks = section(fields, "rank_pattern")
        for pattern in ranks:
            integer(ranks, pattern, most=MOST_RANK)
        alphas = section(fields, "alpha_pattern")
        return PeftConfig(
            base=_joined(
                text(fields, "base_model_name_or_path", ""),
                text(fields, "revision", ""),
            ),
            is_classifier=fields.get("task_type") == "SEQ_CLS",
            rank=integer(fields, "r", most=MOST_RANK),
            alpha=_alpha(fields, "lora_alpha"),
            alpha_pattern=ModulePatterns(
                "alpha_pattern", {name: _alpha(alphas, name) for name in alphas}
            ),
            rslora=flag(fields, "use_rslora", default=False),
            dropout=number(fields, "lora_dropout", 0.0, least=0.0, most=0.999),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _alpha(fields: dict[str, Any], name: str) -> float:
    return number(fields, name, least=1e-6, most=1e6)


def _joined(base: str, revision: str) -> str:
    """Joins name and revision into `name@revision`."""
    if max(len(base), len(revision)) > _MOST_CHARACTERS:
        raise ValueError(
            f"base_model_name_or_path is {shown(base)}, revision {shown(revision)}: "
            f"give at most {_MOST_CHARACTERS} characters"
        )
    is_name = base and revision and not Path(base).exists()
    return f"{base}@{revision}" if is_name else base


def _base_fields(base: str) -> dict[str, str | None]:
    """Fields for the base: an absolute directory, or name and revision."""
    if Path(base).exists():
        base, revision = str(Path(base).resolve()), ""
    else:
        base, _, revision = base.partition("@")
    return {"base_model_name_or_path": base, "revision": revision or None}


def _check_plain(fields: dict[str, Any]) -> None:
    """Raises ValueError naming the first field that is not plain LoRA."""
    for name, allowed in (
        ("peft_type", ("LORA",)),
        ("task_type", (None, "CAUSAL_LM", "SEQ_CLS")),
        ("bias", (None, "none")),
        ("init_lora_weights", _KEEPS_BASE),
    ):
        if fields.get(name) not in allowed:
            known = ", ".join(map(shown, allowed))
            raise ValueError(
                f"{name}={shown(fields.get(name))} is not supported: {known}"
            )
    for name in _UNSUPPORTED:
        if fields.get(name):
            raise ValueError(
                f"{name}={shown(fields[name])} is not supported: plain LoRA only"
            )
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list) or any(
        name not in ("score", "classifier") for name in saved
    ):
        raise ValueError(
            f"modules_to_save={shown(saved)} is not supported: only score can be "
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

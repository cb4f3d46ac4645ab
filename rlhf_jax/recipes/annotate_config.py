"""The configurations of `annotate write` and `annotate read`.

The string below each field is its help on the command line.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.algo.options import check
from rlhf_jax.recipes.tool_configs import GenerateConfig
from rlhf_jax.runtime.annotation import LETTERS, Kind
from rlhf_jax.runtime.judgements import RatingScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateWriteConfig(GenerateConfig):
    """Samples of a model as a file in which a person ranks or rates them.

    Beside the file lies its key, with the texts and which answer is which: keep it.
    """

    output: str = "annotations.csv"
    """file to write: .csv for spreadsheets, or .jsonl; must not exist"""
    samples: int = 4
    """answers per prompt; equal ones are shown once"""
    kind: Kind = "ranking"
    """whether the answers to a prompt are put in order, or rated one by one"""
    scale: RatingScale = dataclasses.field(default_factory=RatingScale)
    """ratings"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        super().validate()
        check(
            not self.chat,
            "chat",
            self.chat,
            "would show people another prompt than the model reads; give chat messages "
            "as data",
        )
        check(
            self.kind == "rating" or self.scale == RatingScale(),
            "scale",
            self.scale,
            "does nothing under kind=ranking; leave it out",
        )
        least = 2 if self.kind == "ranking" else 1
        check(
            least <= self.samples <= len(LETTERS),
            "samples",
            self.samples,
            f"must be from {least} to {len(LETTERS)} under kind={self.kind}",
        )
        check(
            self.temperature > 0 or self.samples == 1,
            "temperature",
            self.temperature,
            "gives equal answers to a prompt; must be above 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateReadConfig:
    """Filled-in files as judgements, with a report of what they say.

    Each file is one person's. Contradictions and repeated judgements are counted and
    kept: `rlhf-jax reward --feedback judgements` decides what becomes of them.
    """

    files: tuple[str, ...]
    """files that came back, one of each person"""
    key: str | None = None
    """key of all files; without it, each has its own beside it"""
    on_unfilled: Literal["fail", "drop"] = "fail"
    """what happens to rows that are not filled in"""
    output: str | None = None
    """.jsonl file to write the judgements to; without it they are only reported"""

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        check(bool(self.files), "files", self.files, "name at least one file")
        if self.output is None:
            return
        check(
            Path(self.output).suffix == ".jsonl",
            "output",
            self.output,
            "the name must end in .jsonl",
        )
        check(
            Path(self.output).resolve() not in [Path(f).resolve() for f in self.files],
            "output",
            self.output,
            "is one of files, which it would overwrite; choose another name",
        )

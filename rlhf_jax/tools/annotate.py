"""Annotation: writes samples of a policy for people to judge, and reads judgments."""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

from rlhf_jax.config.tools import AnnotateReadConfig, AnnotateWriteConfig
from rlhf_jax.data.annotation import (
    AnnotationKey,
    check_new_file,
    key_path,
    read_annotation_file,
    read_key,
    write_annotation_file,
)
from rlhf_jax.data.comparisons import Comparisons, compare
from rlhf_jax.data.judgements import Judgement, judgement_rows
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.recipes.splits import read_reported
from rlhf_jax.run.progress import heading
from rlhf_jax.tools.generate import answer


def write(config: AnnotateWriteConfig) -> int:
    """Samples responses and writes the file; returns its number of prompts.

    Raises:
        ValueError: for invalid input, before anything is compiled.
    """
    config.validate()
    check_new_file(config.output)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    responses: dict[str, list[str]] = defaultdict(list)
    for row in answer(config, distinct=True):
        responses[row["prompt"]].append(row["response"])
    count = write_annotation_file(
        config.output,
        list(responses),
        list(responses.values()),
        kind=config.kind,
        scale=config.scale,
        seed=config.seed,
    )
    heading(
        f"{count} prompts to judge written to {config.output}, their key to "
        f"{key_path(config.output)}"
    )
    if count < len(responses):
        heading(f"{len(responses) - count} prompts dropped: their responses are equal")
    return count


def read(config: AnnotateReadConfig) -> Comparisons:
    """Reports on the files, and writes their judgments.

    Raises:
        ValueError: one line, for invalid input; nothing is written then.
    """
    config.validate()
    key = _common_key(config)
    judgements: list[Judgement] = []
    for file in config.files:
        read_file = partial(
            read_annotation_file, key=config.key, on_unfilled=config.on_unfilled
        )
        judgements += read_reported(file, read_file, quiet=False)
    found = compare(judgements, on_contradiction="keep")
    prompts = len({judgement.prompt for judgement in judgements})
    heading(
        f"{len(judgements)} judgments of {prompts} prompts: {len(found.pairs)} pairs"
    )
    for line in found.report():
        heading(line)
    if config.output is not None:
        scale = key.scale if key.kind == "rating" else None
        rows = judgement_rows(judgements, scale=scale)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.output), "".join(lines))
        heading(f"{len(rows)} judgments written to {config.output}")
    return found


def _common_key(config: AnnotateReadConfig) -> AnnotationKey:
    """The first file's key; all have the same kind and scale."""
    keys = [read_key(file, config.key) for file in config.files]
    for file, key in zip(config.files, keys, strict=True):
        if (key.kind, key.scale) != (keys[0].kind, keys[0].scale):
            raise ValueError(
                f"{file}: has another kind or rating scale than "
                f"{config.files[0]}; read the two separately"
            )
    return keys[0]

"""Tiny runs of the four training commands, as a user would start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

STAGES = ("sft", "reward", "ppo", "grpo")
ROOT = Path(__file__).parents[2]
REWARD = f"{ROOT / 'tests' / 'letter_rewards.py'}:letters"


def environment(work: Path) -> dict[str, str]:
    """Of every process: one cache of programs, so that a start takes seconds."""
    cache = work / "programs"
    cache.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "HF_HUB_OFFLINE": "1",
    }


def command(*arguments: str) -> list[str]:
    """The real command line."""
    return [sys.executable, "-m", "rlhf_jax.cli", *arguments]


def arguments(stage: str, work: Path, run_dir: Path, steps: int) -> list[str]:
    """Arguments of one stage: frequent checkpoints, logs, evaluations and samples."""
    every = {"eval-every": 3, "checkpoint-every": 2, "checkpoint-keep": 3}
    options: dict[str, object] = {"run-dir": run_dir} | every
    options |= {"eval-fraction": 0.2, "batch-size": 8, "data": work / f"{stage}.jsonl"}
    schedule = {"schedule": "constant", "warmup-fraction": 0.0}
    if stage in ("sft", "reward"):
        options |= {"steps": steps, "max-tokens": 96}
        options["checkpoint-keep-lowest"] = "eval/loss"
    else:
        options |= {"updates": steps, "max-new-tokens": 12, "eval-prompts": 8}
        options |= {"policy": work / "start" / "model", "early-stop-patience": 40}
        options |= {"reward-processes": 1, "reward": REWARD, "kl.target": 0.5}
        options |= {"kl.horizon": 200, "early-stop": "eval/score_mean"}
        options["checkpoint-keep-highest"] = "eval/score_mean"
    if stage == "sft":
        shape = {"vocab-size": 300, "width": 32, "num-layers": 2, "num-heads": 2}
        shape["max-positions"] = 96
        options |= {f"fresh.{name}": value for name, value in shape.items()}
    if stage == "reward":
        options["model"] = work / "start" / "model"
    if stage == "ppo":
        options |= {"reward-model": work / "judge" / "model"}
        options |= {"scores.normalization": "running", "epochs": 2, "minibatches": 2}
        optimizer = {"learning-rate": 0.003, **schedule}
        options |= {f"actor-optimizer.{name}": x for name, x in optimizer.items()}
    if stage == "grpo":
        options |= {"group-size": 2, "minibatches": 2}
        optimizer = {"learning-rate": 0.01, **schedule}
        options |= {f"optimizer.{name}": x for name, x in optimizer.items()}
    return [stage, "--quiet", *flags(options)]


def flags(options: dict[str, object]) -> list[str]:
    """`--name value` for each option."""
    return [text for name, x in options.items() for text in (f"--{name}", str(x))]


def prepare(work: Path, *, models: bool = True) -> None:
    """Writes the data, and trains the two models that later stages start from."""
    if (work / "judge" / "model").is_dir():
        return
    from rlhf_jax.tasks import reviews

    told = reviews.make_demonstrations(0, 60)
    pairs = reviews.make_preferences(1, 60)
    prompts = reviews.make_prompts(2, 40)
    rows = {
        "sft": [{"prompt": r.prompt, "completion": r.response} for r in told],
        "reward": [
            {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
            for p in pairs
        ],
        "ppo": [{"prompt": prompt, "copy": prompt} for prompt in prompts],
    }
    rows["grpo"] = rows["ppo"]
    work.mkdir(parents=True, exist_ok=True)
    for stage, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (work / f"{stage}.jsonl").write_text(text, "utf-8")
    for stage, name in (("sft", "start"), ("reward", "judge")) if models else ():
        line = command(*arguments(stage, work, work / name, steps=4))
        subprocess.run(line, env=environment(work), check=True)

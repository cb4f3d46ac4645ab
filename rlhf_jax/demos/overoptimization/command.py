"""Reward hacking on short reviews: PPO and best-of-n against a weak reward model.

After Gao et al., 2022, arXiv:2210.10760: proxy and true reward over √KL, for several β
and for best-of-n. Every policy is trained only on the proxy.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.algo.options import KLOptions
from rlhf_jax.algo.scores import EnsembleScore
from rlhf_jax.config.demos import (
    REWARD_BATCH_SIZE,
    OveroptimizationConfig,
    QuickstartConfig,
)
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import to_dict
from rlhf_jax.config.supervised import RewardConfig
from rlhf_jax.demos import quickstart
from rlhf_jax.demos.overoptimization.best_of_n_curve import (
    best_of_n_curves,
    sample_and_score,
)
from rlhf_jax.demos.overoptimization.curves import Curve
from rlhf_jax.demos.overoptimization.figure import draw
from rlhf_jax.demos.overoptimization.inputs import (
    PAIRS,
    check_pairs,
    check_source,
    enter_directory,
    num_parts,
    read_lines,
)
from rlhf_jax.demos.overoptimization.results import (
    print_tables,
    summarize,
    write_csv,
    write_markdown,
)
from rlhf_jax.demos.review_panel import ReviewPanel
from rlhf_jax.demos.showcase import resumable
from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.recipes import ppo, sft
from rlhf_jax.recipes import reward_model as reward_stage
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.progress import heading
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.session import check_start
from rlhf_jax.tasks import reviews

TRUE_REWARD = "rlhf_jax.tasks.review_judge:true_reward"
JUDGE_FILE = "held_out_models.py"  # its function is JUDGE
JUDGE = "other_models"
JUDGE_TIME_LIMIT = 120.0  # seconds; the first call loads and compiles the models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of PPO."""

    name: str
    beta: float
    scored_by: EnsembleScore | None = None  # None: only by the first reward model

    @property
    def directory(self) -> str:
        """Its name under the run directory."""
        return f"ppo-beta-{self.beta:g}" + (f"-{self.scored_by}" * bool(self.scored_by))


def run(config: OveroptimizationConfig) -> dict[str, Any]:
    """Runs what is missing; plots, prints and returns the numbers.

    A directory can only be resumed with the same options, except for display options
    and the lists of PPO runs and ensemble types.

    Raises:
        ValueError: on invalid input, or if the run directory holds something else or
            has other options; before anything is written.
        Interrupted: after saving a checkpoint, when asked to stop; rerun to resume.
    """
    config.validate()
    root = Path(config.run_dir)
    check_source(config)
    _check_stages(config, root)
    enter_directory(config, root)
    with resumable("overoptimization"):
        source = _source(config, root)
        models = _train_reward_models(config, root, source)
        curves, spread = _best_of_n(config, root, source, models)
        curves = _ppo_curves(config, root, source, models, spread) + curves
    numbers = {"config": to_dict(config)}
    numbers |= summarize(curves, patience=config.patience)
    text = json.dumps(numbers, indent=2, allow_nan=False)
    write_atomic(root / "overoptimization.json", text + "\n")
    summary = json.loads(text)  # as loaded from the file: tuples become lists
    write_csv(root / "overoptimization.csv", curves)
    draw(curves, root / "overoptimization.png", config=config)
    write_markdown(root / "report.md", summary, config=config)
    print_tables(summary)
    heading(f"\nSee {root}/overoptimization.png", quiet=config.quiet)
    return summary


def _check_stages(config: OveroptimizationConfig, root: Path) -> None:
    """Raises ValueError now if a later stage would reject its options."""
    source = Path(config.quickstart or root)
    _reward_config(config, root, source, 0).validate()
    models = [root / f"reward-{number}" for number in range(config.models)]
    for one in _runs(config):
        _ppo_config(config, root, source, models, one, root / JUDGE_FILE).validate()


def _source(config: OveroptimizationConfig, root: Path) -> Path:
    """The directory with SFT model, pairs and prompts; creates them if not given."""
    if config.quickstart is not None:
        return Path(config.quickstart)
    made = root / "quickstart"
    made.mkdir(exist_ok=True)
    like = QuickstartConfig(run_dir=str(made), seed=config.seed, quiet=config.quiet)
    seeds = [quickstart.stage_seed(like, number) for number in range(3)]
    heading("supervised fine-tuning on reviews", quiet=config.quiet)
    if not (made / "demonstrations_held_out.jsonl").exists():
        quickstart.write_demonstrations(made, seeds[0])
    trained = _run_stage(quickstart.sft_config(like, made), sft.run)
    if not (made / quickstart.HELD_OUT_PAIRS).exists():
        quickstart.write_pairs(made, seeds[1], ReviewPanel(trained.model))
    if not (made / "prompts_held_out.jsonl").exists():
        quickstart.write_prompts(made, seeds[2])
    return made


def _run_stage(config: Any, run: Callable[[Any], RunDirectory]):
    """A stage's run: started, resumed, or reused if complete."""
    directory = RunDirectory(Path(config.run_dir))
    if not directory.config.exists():
        return run(config)
    config = dataclasses.replace(config, resume=True)
    check_start(config)  # raises if options differ
    return directory if directory.report.exists() else run(config)


def _train_reward_models(
    config: OveroptimizationConfig, root: Path, source: Path
) -> list[Path]:
    """Trains models with other seeds on random parts of the quickstart's pairs."""
    lines = read_lines(source / PAIRS)
    check_pairs(config, len(lines), f"of {source / PAIRS}")
    order = np.random.default_rng(config.seed).permutation(len(lines))
    models = []
    for number in range(config.models):
        start = number % num_parts(config) * config.pairs
        stage = _reward_config(config, root, source, number)
        chosen = order[start : start + config.pairs]
        write_atomic(Path(stage.data), "".join(lines[i] + "\n" for i in chosen))
        heading(
            f"reward model {number + 1} of {config.models}: {config.pairs} pairs",
            quiet=config.quiet,
        )
        models.append(_run_stage(stage, reward_stage.run).model)
    return models


def _reward_config(
    config: OveroptimizationConfig, root: Path, source: Path, number: int
) -> RewardConfig:
    """The quickstart's reward model config with other pairs and seed."""
    like = QuickstartConfig(run_dir=str(source), quiet=config.quiet)
    return dataclasses.replace(
        quickstart.reward_config(like, source),
        run_dir=str(root / f"reward-{number}"),
        resume=False,
        data=str(root / f"pairs-{number}.jsonl"),
        steps=config.reward_steps,
        batch_size=REWARD_BATCH_SIZE,
        eval_every=config.reward_steps,
        seed=config.seed + number,
    )


def _best_of_n(
    config: OveroptimizationConfig, root: Path, source: Path, models: list[Path]
) -> tuple[list[Curve], float]:
    """Curves of best-of-n, and the standard deviation of the SFT model's true
    reward."""
    heading("best of n, from the SFT model", quiet=config.quiet)
    sizes = f"{config.best_of_prompts}x{config.best_of_samples}"
    scores, true = sample_and_score(
        config,
        source / "sft" / "model",
        models,
        reviews.make_prompts(config.seed + 1, config.best_of_prompts, "heldout"),
        root / f"best-of-n-{sizes}-seed-{config.seed}.npz",
    )
    curves = best_of_n_curves(
        scores, true, ensembles=config.ensembles, penalty=config.ensemble_penalty
    )
    return curves, float(np.std(true))


def _runs(config: OveroptimizationConfig) -> list[Run]:
    single = [Run(name=f"PPO, β = {beta:g}", beta=beta) for beta in config.betas]
    beta = config.ensemble_beta
    return single + [
        Run(name=f"PPO, β = {beta:g}, {how}", beta=beta, scored_by=how)
        for how in config.ensembles
    ]


def _ppo_curves(
    config: OveroptimizationConfig,
    root: Path,
    source: Path,
    models: list[Path],
    spread: float,
) -> list[Curve]:
    """Runs PPO; the evaluations of each run are the points of a curve."""
    judge = root / JUDGE_FILE
    write_atomic(judge, _judge_code(models[1:]))
    runs, curves = _runs(config), []
    began, trained = time.perf_counter(), 0
    for number, one in enumerate(runs):
        left = ""
        if trained:
            seconds = (time.perf_counter() - began) / trained * (len(runs) - number)
            left = f", about {seconds / 60:.0f} min to go for all"
        heading(
            f"run {number + 1} of {len(runs)}: {one.name}{left}", quiet=config.quiet
        )
        stage = _ppo_config(config, root, source, models, one, judge)
        is_done = RunDirectory(Path(stage.run_dir)).report.exists()
        directory = _run_stage(stage, ppo.run)
        trained += not is_done
        curves.append(_read_curve(directory, one, config.eval_prompts, spread))
    return curves


def _ppo_config(
    config: OveroptimizationConfig,
    root: Path,
    source: Path,
    models: list[Path],
    one: Run,
    judge: Path,
) -> PPOConfig:
    """The quickstart's PPO config with other reward models, β and length."""
    like = QuickstartConfig(run_dir=str(source), seed=config.seed, quiet=config.quiet)
    paths = [str(model) for model in models]
    stage = dataclasses.replace(
        quickstart.ppo_config(like, source),
        run_dir=str(root / one.directory),
        resume=False,
        reward_model=paths[0],
        kl=KLOptions(coef=one.beta),
        updates=config.updates,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        eval_prompts=config.eval_prompts,
        checkpoint_every=config.eval_every,
        eval_reward=(TRUE_REWARD, f"{judge}:{JUDGE}"),
        eval_pass=None,
        reward_processes=1,
        reward_time_limit=JUDGE_TIME_LIMIT,
    )
    if one.scored_by is None:
        return stage
    stage = dataclasses.replace(
        stage, ensemble=tuple(paths[1:]), ensemble_score=one.scored_by
    )
    if one.scored_by == "mean-minus-std":
        stage = dataclasses.replace(stage, ensemble_penalty=config.ensemble_penalty)
    return stage


def _judge_code(models: list[Path]) -> str:
    """Code of a reward function: the worst case of all models but the first."""
    paths = [str(model.absolute()) for model in models]
    return (
        '"""Reward models that PPO against the first one never sees."""\n\n'
        "from rlhf_jax.rewards.reward_models import RewardJudge\n\n"
        f'{JUDGE} = RewardJudge({json.dumps(paths)}, how="worst")\n'
    )


def _read_curve(
    directory: RunDirectory, one: Run, num_prompts: int, spread: float
) -> Curve:
    """The evaluations of a run.

    Only means are logged. The standard error is that of the same number of SFT
    responses, whose true rewards vary more than those of most later policies.
    """
    rows = [row for row in read_metrics(directory.metrics) if "eval/score_mean" in row]
    return Curve(
        name=one.name,
        method="ppo",
        scored_by=one.scored_by or "single",
        beta=one.beta,
        at=[int(row["step"]) for row in rows],
        kl=[float(row["eval/kl_sequence"]) for row in rows],
        proxy=[float(row["eval/score_mean"]) for row in rows],
        true=[float(row["eval/reward/true_reward"]) for row in rows],
        true_error=[spread / num_prompts**0.5] * len(rows),
        others=[float(row[f"eval/reward/{JUDGE}"]) for row in rows],
    )

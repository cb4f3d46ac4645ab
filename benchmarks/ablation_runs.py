"""The runs of an ablation, each done once in a worker process."""

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import timing
from ablation_cases import Case
from ablation_report import Run

from rlhf_jax.cli import quieten_libraries, use_compilation_cache
from rlhf_jax.config.ppo import PPOConfig
from rlhf_jax.config.run import to_dict
from rlhf_jax.demos.review_panel import ReviewPanel
from rlhf_jax.learner.finite import NonFiniteError
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.recipes import ppo
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.progress import heading, progress
from rlhf_jax.run.run_directory import RunDirectory, write_atomic
from rlhf_jax.tasks import reviews

JUDGE_SEED = 7  # of held-out prompts and sampling: the same for every policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One PPO run and its evaluation, for a worker process."""

    case: Case
    config: PPOConfig
    models: Path  # directory of SFT and reward model
    num_judged: int

    @property
    def result(self) -> Path:
        """File of the outcome, one line of JSON."""
        return Path(self.config.run_dir) / "result.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the outcome depends on, as read back from JSON."""
        values = to_dict(self.config) | {"num_judged": self.num_judged}
        for name in ("run_dir", "resume", "resume_step", "quiet"):
            del values[name]
        return json.loads(json.dumps(values))


def read_result(job: Job) -> Run | None:
    """The outcome of a job that is already done.

    Raises:
        ValueError: its directory contains one with other options.
    """
    if not job.result.exists():
        return None
    found = json.loads(job.result.read_text("utf-8"))
    if found["settings"] != job.settings:
        raise ValueError(
            f"{job.config.run_dir} was run with other options than {job.case.name} "
            "has now; remove it or choose another --work-dir"
        )
    names = [field.name for field in dataclasses.fields(Run)]
    return Run(**{name: found[name] for name in names})


@functools.cache
def _panel(models: Path) -> ReviewPanel:
    """One per process: it compiles its sampler."""
    return ReviewPanel(models / "sft" / "model", models / "reward" / "model")


def judge(models: Path, policy: Path, num_prompts: int) -> dict[str, float]:
    """Figures of a policy on held-out prompts, except its time."""
    panel = _panel(models)
    prompts = reviews.make_prompts(JUDGE_SEED, num_prompts, "heldout")
    _, params = load_pretrained(policy)
    texts, answers = panel.answers(prompts, seed=JUDGE_SEED, params=params)
    measured = answers.metrics()
    figures = {
        "true_reward": float(reviews.true_rewards(prompts, texts).mean()),
        "proxy_reward": measured["score_mean"],
        "kl": measured["kl_sequence"],
        "length": measured["length_mean"],
        "stop_rate": measured["stop_rate"],
    }
    # The KL of the SFT model itself is rounding noise; + 0.0 turns -0.0 into 0.0.
    return {name: round(value, 4) + 0.0 for name, value in figures.items()}


def run_job(job: Job) -> Run:
    """Trains and evaluates one policy in a worker process; writes `result.json`."""
    run = RunDirectory(Path(job.config.run_dir))
    config = dataclasses.replace(job.config, resume=run.config.exists())
    figures = error = None
    try:
        ppo.run(config)
        figures = judge(job.models, run.model, job.num_judged)
        rows = read_metrics(run.metrics)
        seconds = [row["time/step_seconds"] for row in rows if row["step"] > 0]
        steady = seconds[1:] or seconds  # the first update compiles
        figures["wall_seconds"] = statistics.median(steady) * config.updates
    except NonFiniteError as diverged:
        error = str(diverged)
    result = Run(case=job.case.name, seed=config.seed, figures=figures, error=error)
    about = {
        "flags": job.case.shown_flags,
        "settings": job.settings,
        "machine": timing.machine(),
    }
    write_atomic(job.result, json.dumps(dataclasses.asdict(result) | about) + "\n")
    if run.checkpoints.exists():
        shutil.rmtree(run.checkpoints)  # ten times as large as the policy
    return result


def _start_worker(num_threads: int) -> None:
    """Settings of a worker, before it touches a device."""
    # Number of CPU threads of XLA. Single-threaded workers finish more updates in total
    # than one program that splits small matrices over all cores.
    os.environ["NPROC"] = str(num_threads)
    # Ctrl-C reaches every process. A training loop stops after its step, and writes a
    # checkpoint; a worker that does anything else leaves without a traceback.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    quieten_libraries()
    use_compilation_cache()


def _run_in_workers(jobs: Sequence[Job], num_workers: int) -> Iterator[Run]:
    """Outcomes in the order of completion.

    Raises:
        SystemExit: after Ctrl-C, once the runs in progress have written checkpoints;
            where that reaches this process first, KeyboardInterrupt.
    """
    context = multiprocessing.get_context("spawn")  # JAX has threads: no fork
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    with ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(num_threads,),
    ) as pool:
        # No more than are worked on: after Ctrl-C none is left to begin.
        waiting = iter(jobs)
        running = {pool.submit(run_job, job) for job in islice(waiting, num_workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            running |= {pool.submit(run_job, job) for job in islice(waiting, len(done))}


def run_all(jobs: Sequence[Job], num_workers: int) -> list[Run]:
    """Outcomes of all jobs; finished ones are not repeated."""
    found = [(job, read_result(job)) for job in jobs]
    runs = [run for _, run in found if run is not None]
    todo = [job for job, run in found if run is None]
    heading(
        f"PPO: {len(jobs)} runs of {jobs[0].config.updates} updates, {len(runs)} of "
        f"them done; {num_workers} at a time"
    )
    with progress(len(jobs), "ablation", start=len(runs)) as bar:
        for run in _run_in_workers(todo, num_workers) if todo else ():
            runs.append(run)
            figures = run.figures or {"true_reward": float("nan")}
            bar.update(len(runs), {f"{run.case} true reward": figures["true_reward"]})
    return runs

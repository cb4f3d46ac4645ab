"""A run goes on from its latest good checkpoint, and only if it can."""

import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from rlhf_jax.config.supervised import SFTConfig
from rlhf_jax.run.log_files import read_metrics
from rlhf_jax.run.session import Session, check_start


@pytest.fixture
def config(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')

    def make(**options):
        given = {
            "run_dir": str(tmp_path / "run"),
            "data": str(tmp_path / "data.jsonl"),
            "steps": 100,
            "checkpoint_every": 10,
            "quiet": True,
        }
        return SFTConfig(**(given | options))

    return make


def run_to(config, last):
    """Steps to `last`; the state counts them. Returns the step it started from."""
    with Session(config) as session:
        state = session.restore({"x": jnp.float32(0)})
        first = session.start_step
        assert state["x"] == first
        if first == 0:
            session.log(0, {"eval/loss": 9.0}, shown={})
        for step in range(first + 1, last + 1):
            state = {"x": state["x"] + 1}
            session.counters["tokens"] = session.counters.get("tokens", 0) + 100
            metrics = {"tokens": session.counters["tokens"]}
            if step % 5 == 0:
                metrics["eval/loss"] = float(abs(step - 35))
            session.log(step, metrics, shown={})
            session.checkpoint(step, state)
    return first


def checkpoints(tmp_path):
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def damage(tmp_path, step, how):
    folder = tmp_path / "run" / "checkpoints" / str(step)
    data = max(folder.glob("state/ocdbt.process_0/d/*"))
    if how == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "shard":
        data.unlink()
    else:
        (tmp_path / "run" / "checkpoints" / "99").mkdir()


@pytest.mark.parametrize(
    ("how", "name"),
    [("flip", "30"), ("truncate", "30"), ("shard", "30"), ("empty", "99")],
)
def test_the_checkpoint_before_a_damaged_one_is_used(
    tmp_path, config, capsys, how, name
):
    run_to(config(), 33)
    damage(tmp_path, 30, how)
    check_start(config(resume=True))
    start = 20 if name == "30" else 30
    assert run_to(config(resume=True), 35) == start
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"warning: checkpoint {name} is damaged \(.*\); using", line)
    # Kept for a look, and out of the way of the new one.
    assert f"damaged-{name}" in checkpoints(tmp_path)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(36))
    assert [row["tokens"] for row in rows[1:]] == [100 * n for n in range(1, 36)]
    assert run_to(config(resume=True), 36) == 30


def test_a_run_without_a_good_checkpoint_is_refused(tmp_path, config, capsys):
    run_to(config(), 25)
    damage(tmp_path, 10, "flip")
    damage(tmp_path, 20, "shard")
    with pytest.raises(ValueError, match=r"20 is damaged .*; checkpoint 10 .*start a"):
        run_to(config(resume=True), 30)
    assert "checkpoint 10" not in capsys.readouterr().err  # no one before it
    assert checkpoints(tmp_path) == ["10", "20"]
    with pytest.raises(ValueError, match=r"resume-step=20.* is damaged .*others: 10"):
        check_start(config(resume=True, resume_step=20))
    capsys.readouterr()


def test_a_rescue_rotates_nothing_out(tmp_path, config):
    run_to(config(), 25)
    with Session(config(resume=True)) as session:
        state = session.restore({"x": jnp.float32(0)})
        session.log(21, {}, shown={})
        with pytest.raises(
            ValueError, match=r"a reason\. The run is saved after step 21"
        ):
            session.save_and_raise(21, state, ValueError("a reason"))
    assert checkpoints(tmp_path) == ["10", "20", "21"]


def test_which_checkpoints_stay(tmp_path, config):
    options = {"checkpoint_keep_every": 20, "checkpoint_keep_lowest": "eval/loss"}
    run_to(config(checkpoint_keep=1, **options), 58)
    # |step − 35| is lowest at step 35, which gets a checkpoint for that.
    assert checkpoints(tmp_path) == ["20", "35", "40", "50"]
    options = {"checkpoint_keep": 1, "checkpoint_keep_lowest": "eval/loss"}
    assert run_to(config(resume=True, **options), 61) == 50
    assert checkpoints(tmp_path) == ["35", "60"]


def test_the_metric_of_the_best_checkpoint_must_exist(config):
    with pytest.raises(
        ValueError, match=r"checkpoint-keep-highest.*of this run: eval/l"
    ):
        check_start(config(checkpoint_keep_highest="eval/los"))
    with pytest.raises(ValueError, match=r"checkpoint-keep-lowest.*eval/perplexity"):
        check_start(config(checkpoint_keep_lowest="eval/score_mean"))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ({13, 14}, "lacks 2 steps up to checkpoint 20, from step 13; restore it, go "
         "back with --resume-step 10, or accept the gap with --accept-changed history"),
        ({0}, "lacks one step up to checkpoint 20, from step 0; restore it, or accept"),
        (set(range(26)), "lacks 21 steps"),
    ],
)  # fmt: skip
def test_a_gap_in_the_metrics_is_refused_or_accepted(tmp_path, config, gone, message):
    run_to(config(), 25)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(n for i, n in enumerate(lines) if i not in gone))
    with pytest.raises(ValueError, match=message):
        check_start(config(resume=True))
    with pytest.raises(ValueError, match=message):
        run_to(config(resume=True), 30)
    run_to(config(resume=True, accept_changed=("history",)), 21)
    assert read_metrics(path)[-1] == {"step": 21, "tokens": 2100}


def test_a_damaged_line_of_metrics_is_refused(tmp_path, config):
    run_to(config(), 25)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 7,', '"step" 7,'))
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 8: .*delete it and acc"):
        check_start(config(resume=True))


def test_changed_data_is_refused_or_accepted_once(tmp_path, config, capsys):
    run_to(config(), 15)
    (tmp_path / "data.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ValueError, match="data changed since"):
        check_start(config(resume=True))
    check_start(config(resume=True, accept_changed=("data",)))
    assert capsys.readouterr().err == ""
    run_to(config(resume=True, accept_changed=("data",)), 20)
    (line,) = capsys.readouterr().err.splitlines()  # told once
    assert line.startswith("warning: data changed since checkpoint 10")
    run_to(config(resume=True), 30)  # the new data are now those of the run
    assert capsys.readouterr().err == ""


def test_an_evaluation_after_its_checkpoint_decides_what_is_kept(tmp_path, config):
    options = {"checkpoint_keep": 1, "checkpoint_keep_lowest": "eval/loss"}
    with Session(config(**options)) as session:  # its evaluation after step 2 fails
        state = session.restore({"x": jnp.float32(0)})
        session.log(0, {}, shown={})
        session.log(1, {"eval/loss": 5.0}, shown={})
        session.checkpoint(1, state)
        session.log(2, {}, shown={})
        with pytest.raises(ValueError, match="saved after step 2"):
            session.save_and_raise(2, state, ValueError("no reward"))
    with Session(config(resume=True, **options)) as session:
        state = session.restore({"x": jnp.float32(0)})
        assert session.start_step == 2
        session.log(2, {"eval/loss": 3.0}, shown={})
        for step, loss in ((3, 4.0), (10, 6.0), (20, 7.0)):
            session.log(step, {"eval/loss": loss}, shown={})
            session.checkpoint(step, state)
    assert checkpoints(tmp_path) == ["2", "20"]


def test_a_metric_that_is_named_on_resume_rates_earlier_checkpoints(tmp_path, config):
    run_to(config(), 41)  # 30 and 40 both have the lowest loss that is saved, 5
    run_to(config(resume=True, checkpoint_keep_lowest="eval/loss"), 70)
    assert checkpoints(tmp_path) == ["30", "60", "70"]


def test_a_metric_that_no_evaluation_has_is_refused_before_a_resume(config):
    run_to(config(), 12)
    with pytest.raises(
        ValueError, match=r"keep-highest='eval/los': must be.*eval/loss"
    ):
        check_start(config(resume=True, checkpoint_keep_highest="eval/los"))


HOLD = """
import sys
from pathlib import Path
from rlhf_jax.run.run_directory import RunDirectory
from rlhf_jax.run.run_lock import run_lock

with run_lock(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_has_one_owner(tmp_path, config):
    run_to(config(), 15)
    launches = tmp_path / "run" / "launches.jsonl"
    row = json.loads(launches.read_text()) | {"process": 4321, "host": "node7"}
    launches.write_text(json.dumps(row) + "\n")
    unfinished = tmp_path / "run" / "checkpoints" / "20.orbax-checkpoint-tmp"
    unfinished.mkdir()
    before = sorted((tmp_path / "run").rglob("*"))
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        in_use = r"run is in use by a running process \(4321 on node7\)"
        for start in (check_start, Session):
            with pytest.raises(ValueError, match=in_use):
                start(config(resume=True))
        assert sorted((tmp_path / "run").rglob("*")) == before
        owner.kill()
    assert run_to(config(resume=True), 20) == 10
    assert not unfinished.exists()


def test_two_sessions_of_one_process_exclude_each_other(config):
    with Session(config()), pytest.raises(ValueError, match="in use"):
        Session(config(resume=True))
    with Session(config(resume=True)):
        pass


def test_leftovers_of_a_killed_write_are_removed(tmp_path, config):
    run_to(config(), 15)
    left = tmp_path / "run" / ".report.html.4321.tmp"
    left.write_text("half")
    run_to(config(resume=True), 16)
    assert not left.exists()


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path, config):
    run_to(config(), 21)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    logged = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"has 21 steps, but .* has no checkpoint"):
        check_start(config(resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == logged
    check_start(config(resume=True, accept_changed=("history",)))


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_over(config):
    run_to(config(checkpoint_every=50), 21)
    check_start(config(resume=True, checkpoint_every=5))


def test_wrong_samples_are_refused_before_any_work(tmp_path, config):
    run_to(config(), 10)
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1: prompt is null"):
        check_start(config(resume=True))

"""A run directory belongs to one run, and says what it was."""

import os
from pathlib import Path

import jax
import pytest
import yaml

from rlhf_jax.files.atomic import write_atomic
from rlhf_jax.run.run_directory import RunDirectory, open_run

CONFIG = {
    "run_dir": Path("runs/a"),
    "resume": False,
    "seed": 3,
    "steps": 100,
    "clip_eps": (0.2, 0.28),
    "target": None,
    "actor": {"learning_rate": 1e-6, "b1": 0.9},
}


def test_a_new_run_stores_its_configuration_and_origin(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/rlhf-jax", "ppo", "--run-dir", "a b"])
    run = open_run(tmp_path / "deep" / "run", CONFIG, stage="ppo")
    stored = yaml.safe_load(run.config.read_text())
    assert stored == run.read_config()
    assert stored["actor"] == {"learning_rate": 1e-6, "b1": 0.9}
    assert stored["clip_eps"] == [0.2, 0.28]
    assert stored["run_dir"] == "runs/a"
    assert list(stored) == list(CONFIG)
    (launch,) = run.read_launches()
    assert launch["command"] == "rlhf-jax ppo --run-dir 'a b'"
    assert launch["stage"] == "ppo"
    assert launch["versions"]["jax"] == jax.__version__
    assert launch["devices"] == jax.device_count()


@pytest.mark.parametrize("trace", ["config.yaml", "metrics.jsonl", "model"])
def test_the_directory_of_another_run_is_refused_and_left_alone(tmp_path, trace):
    (tmp_path / trace).write_text("precious")
    with pytest.raises(ValueError, match=f"already contains a run.*{trace}") as caught:
        open_run(tmp_path, CONFIG, stage="ppo")
    assert "--resume" in str(caught.value)
    assert "another --run-dir" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [trace]
    assert (tmp_path / trace).read_text() == "precious"


def test_foreign_files_do_not_matter(tmp_path):
    (tmp_path / "slurm-17.out").write_text("log")
    assert open_run(tmp_path, CONFIG, stage="ppo").config.exists()


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        open_run(tmp_path / "file", CONFIG, stage="ppo")


def test_resume_replaces_what_may_differ_and_remembers_every_launch(tmp_path):
    open_run(tmp_path, CONFIG, stage="ppo")
    changed = CONFIG | {"resume": True, "steps": 200, "clip_eps": [0.2, 0.28]}
    run = open_run(
        tmp_path, changed, stage="ppo", resume=True, free_on_resume=("resume", "steps")
    )
    assert run.read_config()["steps"] == 200
    assert len(run.read_launches()) == 2


def test_resume_with_another_configuration_names_every_difference(tmp_path):
    run = open_run(tmp_path, CONFIG, stage="ppo")
    before = run.config.read_text()
    actor = {"learning_rate": 2e-6, "b1": 0.9}
    changed = CONFIG | {"seed": 4, "actor": actor, "steps": 200, "new": 1}
    del changed["target"]
    with pytest.raises(ValueError) as caught:
        open_run(tmp_path, changed, stage="ppo", resume=True)
    message = str(caught.value)
    assert "seed was 3 and is now 4" in message
    assert "actor.learning_rate was 1e-06 and is now 2e-06" in message
    assert "steps was 100 and is now 200" in message
    assert "target was None and is now not set" in message
    assert "new was not set and is now 1" in message
    assert "b1" not in message
    assert "\n" not in message
    assert run.config.read_text() == before


def test_a_section_may_differ_as_a_whole(tmp_path):
    open_run(tmp_path, CONFIG, stage="ppo")
    changed = CONFIG | {"actor": {"learning_rate": 1.0}}
    with pytest.raises(ValueError, match=r"actor\.learning_rate"):
        open_run(tmp_path, changed, stage="ppo", resume=True, free_on_resume=("act",))
    run = open_run(
        tmp_path, changed, stage="ppo", resume=True, free_on_resume=("actor",)
    )
    assert run.read_config()["actor"] == {"learning_rate": 1.0}


def test_resume_needs_a_run_of_the_same_stage(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        open_run(tmp_path / "none", CONFIG, stage="ppo", resume=True)
    assert not (tmp_path / "none").exists()
    open_run(tmp_path, CONFIG, stage="sft")
    with pytest.raises(ValueError, match="as ppo: it contains a run of sft"):
        open_run(tmp_path, CONFIG, stage="ppo", resume=True)


def test_a_value_that_yaml_cannot_hold_is_named(tmp_path):
    config = {"model": {"dtypes": ["float32", object]}}
    with pytest.raises(ValueError, match=r"model\.dtypes\[1\]=<class 'object'>"):
        open_run(tmp_path, config, stage="ppo")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_atomic(path, "old ü\n")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_bytes() == "old ü\n".encode()


def test_other_processes_do_not_touch_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run = open_run(tmp_path / "run", CONFIG, stage="ppo")
    assert run == RunDirectory(tmp_path / "run")
    assert not run.path.exists()


@pytest.mark.parametrize("line", ["[1]", '{"a": 1}', '{"stage": ["ppo"]}', "{"])
def test_a_start_that_was_not_written_by_a_run_is_named(tmp_path, line):
    run = open_run(tmp_path, CONFIG, stage="ppo")
    with run.launches.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"launches\.jsonl, line 2: .*delete the line"):
        open_run(tmp_path, CONFIG, stage="ppo", resume=True)


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="pipe: is not a file; give another name"):
        write_atomic(path, "text")
    assert path.is_fifo()


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*report\.html'"):
        write_atomic(tmp_path / "report.html", "text")

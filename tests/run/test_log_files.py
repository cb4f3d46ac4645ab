"""Lines of numbers: exact, strict JSON, and free of traces of an interruption."""

import json
import math
import os
import sys
import types
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.run.log_files import (
    MetricsWriter,
    SamplesWriter,
    read_metrics,
    read_samples,
)


def strict_rows(path):
    """Oracle: a parser that refuses what JSON does not have."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_numbers_come_back_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    third = np.float32(1 / 3)
    with MetricsWriter(path) as writer:
        writer.write(
            0,
            {
                "python": 0.1,
                "float32": jnp.float32(1 / 3),
                "bfloat16": jnp.bfloat16(1 / 3),
                "numpy": third,
                "int": jnp.int32(7),
                "bool": True,
            },
        )
        assert len(strict_rows(path)) == 1  # readable while the run goes on
    (row,) = read_metrics(path)
    assert row == {
        "step": 0,
        "python": 0.1,
        "float32": float(third),
        "bfloat16": 0.333984375,  # 1/3 in 8 significant bits: 171 / 512
        "numpy": float(third),
        "int": 7,
        "bool": 1,
    }
    assert np.float32(row["float32"]) == third
    names = ["step", "python", "float32", "bfloat16", "numpy", "int", "bool"]
    assert list(row) == names  # the order of the caller
    assert isinstance(row["int"], int)


def test_what_json_lacks_is_written_as_text_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(0, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": -np.inf})
    assert strict_rows(path) == [{"step": 0, "a": "nan", "b": "inf", "c": "-inf"}]
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"x": jnp.zeros(2)}, "x="),
        ({"x": "0.5"}, "x='0.5'"),
        ({"x": None}, "x=None"),
        ({"x": 1j}, "x=1j"),
        ({"step": 3}, "'step'"),
    ],
)
def test_anything_but_a_number_is_refused(tmp_path, metrics, message):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        with pytest.raises(ValueError, match=message):
            writer.write(0, metrics)
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    def run(path, steps, start_step):
        with (
            MetricsWriter(path / "m.jsonl", start_step=start_step) as metrics,
            SamplesWriter(path / "s.jsonl", start_step=start_step) as samples,
        ):
            for step in steps:
                metrics.write(step, {"loss": 1 / (step + 1)})
                row = {"prompt": "2+2=", "response": f"{step}\n\ud800é", "score": None}
                samples.write(step, [row, row | {"score": np.float32(0.5)}])

    once, twice = tmp_path / "once", tmp_path / "twice"
    run(once, range(9), 0)
    run(twice, range(7), 0)  # the last checkpoint was after step 4
    with open(twice / "m.jsonl", "ab") as file:
        file.write(b'{"step": 7, "lo')  # killed in the middle of a line
    run(twice, range(5, 9), 5)
    for name in ("m.jsonl", "s.jsonl"):
        assert (once / name).read_bytes() == (twice / name).read_bytes()
    assert [row["step"] for row in read_metrics(twice / "m.jsonl")] == list(range(9))
    samples = read_samples(twice / "s.jsonl")
    assert len(samples) == 18
    assert samples[17] == {
        "step": 8, "prompt": "2+2=", "response": "8\n\ud800é", "score": 0.5
    }  # fmt: skip


def test_a_line_under_way_is_not_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a"')
    assert read_metrics(path) == [{"step": 0, "a": 1}]


@pytest.mark.parametrize("line", ["{oops", "[1, 2]", '{"a": 1}'])
def test_a_broken_line_is_named_and_nothing_is_cut_off(tmp_path, line):
    path = tmp_path / "m.jsonl"
    text = f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'
    path.write_text(text)
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: "):
        MetricsWriter(path, start_step=2)
    assert path.read_text() == text


def test_a_sample_needs_prompt_and_response(tmp_path):
    with SamplesWriter(tmp_path / "s.jsonl") as samples:
        with pytest.raises(ValueError, match=r"\['prompt', 'text'\]"):
            samples.write(0, [{"prompt": "a", "text": "b"}])
    assert (tmp_path / "s.jsonl").read_text() == ""


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "m.jsonl", tensorboard=True) as metrics:
        metrics.write(0, {"a": 1})
    with SamplesWriter(tmp_path / "s.jsonl") as samples:
        samples.write(0, [{"prompt": "a"}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_says_how_to_install_it(
    tmp_path, monkeypatch, option, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"rlhf-jax\[{option}\]"):
        MetricsWriter(tmp_path / "m.jsonl", **{option: True})


class Recorder:
    """Stands in for the writers of TensorBoard and Weights & Biases."""

    def __init__(self, calls):
        self.calls = calls

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_tensorboard_gets_every_number_and_hides_the_overhang(tmp_path, monkeypatch):
    calls = []

    def summary_writer(directory, *, purge_step):
        calls.append(("open", (directory,), {"purge_step": purge_step}))
        return Recorder(calls)

    fake = types.SimpleNamespace(SummaryWriter=summary_writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with MetricsWriter(tmp_path / "m.jsonl", start_step=4, tensorboard=True) as writer:
        writer.write(4, {"a": jnp.float32(0.5), "b": 2})
    directory = str(tmp_path / "tensorboard")
    assert calls[0] == ("open", (directory,), {"purge_step": 4})
    assert ("add_scalar", ("a", 0.5, 4), {}) in calls
    assert ("add_scalar", ("b", 2, 4), {}) in calls
    assert calls[-1][0] == "close"


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(("init", (), options))
        return Recorder(calls)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in range(2):
        path = tmp_path / "m.jsonl"
        config = {"seed": 1}
        with MetricsWriter(path, start_step=step, wandb=True, config=config) as writer:
            writer.write(step, {"a": 0.5})
    starts = [options for name, _, options in calls if name == "init"]
    assert starts[0] == starts[1]
    assert starts[0]["config"] == {"seed": 1}
    assert ("log", ({"a": 0.5},), {"step": 1}) in calls
    assert calls[-1][0] == "finish"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"step": 2, "x": "abc"}', '"x" is "abc", not a number'),
        ('{"step": 2, "x": [1]}', '"x" is [1], not a number'),
        ('{"step": 2, "x": null}', '"x" is null, not a number'),
        ('{"step": true}', "step is true: give an integer"),
        ('{"step": -5}', "step is -5: give an integer"),
        ('{"step": 0}', "step 0 comes after step 1"),
    ],
)
def test_a_line_of_metrics_that_is_wrong_is_named(tmp_path, row, problem):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "x": "nan"}}\n{row}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError) as caught:
        read_metrics(path)
    assert str(caught.value).startswith(f"{path}, line 2: {problem}")
    if "step" in problem:  # such a file is not cut off
        with pytest.raises(ValueError):
            MetricsWriter(path, start_step=1)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ('"response": "b"', "prompt is null: give a text"),
        ('"prompt": ["a"], "response": "b"', 'prompt is ["a"]: give a text'),
        ('"prompt": "a", "response": "b", "score": {}', '"score" is {}, not a'),
    ],
)
def test_a_line_of_samples_that_is_wrong_is_named(tmp_path, fields, problem):
    path = tmp_path / "samples.jsonl"
    path.write_text(f'{{"step": 1, {fields}}}\n')
    with pytest.raises(ValueError) as caught:
        read_samples(path)
    assert str(caught.value).startswith(f"{path}, line 1: {problem}")


def test_the_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    full = OSError(28, "No space left on device")
    with MetricsWriter(path) as writer:
        monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            writer.sync()


def test_what_could_not_be_written_names_the_file_at_the_end_too(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with (
            pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"),
            MetricsWriter(tmp_path / "metrics.jsonl") as writer,
        ):
            writer.write(0, {"x": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

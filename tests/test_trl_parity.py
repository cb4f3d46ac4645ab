"""TRL's own trainer and this library compute the same update from the same samples."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"

needs_trl = pytest.mark.skipif(
    not (ROOT / ".venv-trl" / "complete").is_file(),
    reason="no .venv-trl; benchmarks/trl_parity.py makes it",
)


@pytest.fixture(scope="module")
def parity():
    """The module `benchmarks/trl_parity.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("trl_parity")


@pytest.fixture(scope="module")
def recorded(parity, tmp_path_factory):
    """Settings of one update that TRL has taken, in microbatches."""
    directory = tmp_path_factory.mktemp("trl")
    case = parity.CASES["microbatches"]
    return parity.record_trl(case, 1, TRL_PYTHON, directory)


def row(parity, ours, trl, tolerance):
    (found,) = parity.compare(
        {"x": np.array(ours)}, {"x": np.array(trl)}, {"x": tolerance}
    )
    return found


def test_a_row_is_relative_to_the_largest_value(parity):
    found = row(parity, [1.0, -3.9], [1.05, -4.0], 0.03)
    assert found.difference == pytest.approx(0.1)
    assert found.relative == pytest.approx(0.025)
    assert found.agrees
    assert not row(parity, [1.0, -3.9], [1.05, -4.0], 0.02).agrees


def test_nan_and_nothing_but_zeros_do_not_agree(parity):
    assert not row(parity, [np.nan, 1.0], [1.0, 1.0], 1.0).agrees
    assert not row(parity, [1.0, 1.0], [np.nan, 1.0], 1.0).agrees
    assert not row(parity, [0.0, 0.0], [0.0, 0.0], 1.0).agrees


def test_shapes_must_be_equal(parity):
    with pytest.raises(ValueError, match=r"x: \(1,\) against \(2,\)"):
        row(parity, [1.0], [1.0, 2.0], 1.0)


@needs_trl
@pytest.mark.parametrize("case", ["gpt2", "llama", "microbatches"])
def test_two_updates_agree_with_trl(case):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "trl_parity.py", "--case", case],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["differ"] == 0
    updates = result["cases"][case]
    assert len(updates) == 2
    for rows in updates:
        names = {found["name"] for found in rows}
        assert {"scores, less the penalty", "returns", "actor, change"} <= names
        # An update that clips nothing would not tell PPO from plain policy gradients.
        clipped = {found["name"]: found["largest"] for found in rows}
        assert clipped["clip fraction"] > 0.02
        assert clipped["value clip fraction"] > 0.02
    assert any(line.startswith("actor, change") for line in lines)


@needs_trl
def test_what_is_compared_is_ragged(recorded):
    with np.load(Path(recorded["directory"]) / "update-1.npz") as found:
        queries, responses = found["queries"], found["responses"]
        steps, lengths = found["steps"], found["sequence_lengths"] + 1
    padding = queries == recorded["pad_id"]
    assert len(set(padding.sum(axis=1))) > 2
    stopped = (responses == recorded["stop_id"]).any(axis=1)
    assert 3 < stopped.sum() < 13
    assert len(set(lengths[stopped])) > 2
    assert set(lengths[~stopped]) == {responses.shape[1]}
    # Three epochs of one step of four microbatches of four sequences, shuffled anew.
    assert steps.shape == (3, 4, 4)
    np.testing.assert_array_equal(np.sort(steps.reshape(3, 16)), [range(16)] * 3)
    assert (steps[0] != steps[1]).any()


@needs_trl
@pytest.mark.parametrize(
    ("part", "change", "first"),
    [
        # Rows stand in the order of computation, so that the first to differ tells
        # where; optimizer steps show from the second one on.
        ("method", {"temperature": 1.0}, "old log-probabilities"),
        ("scores", {"missing_eos_penalty": 0.9}, "scores, less the penalty"),
        ("scores", {"end_value": "zero"}, "values"),
        ("advantages", {"ddof": 0}, "advantages, whitened"),
        ("policy_loss", {"mean_of_means": False}, "policy loss"),
        ("value_loss", {"coef": 1.0}, "value loss"),
        ("actor_optimizer", {"learning_rate": 2e-4}, "policy loss"),
    ],
)
def test_another_convention_shows(parity, recorded, part, change, first):
    method = parity.METHOD
    if part == "method":
        method = dataclasses.replace(method, **change)
    else:
        options = dataclasses.replace(vars(method)[part], **change)
        method = dataclasses.replace(method, **{part: options})
    (rows,) = parity.compare_case(recorded, 1, method)
    assert next(found.name for found in rows if not found.agrees) == first

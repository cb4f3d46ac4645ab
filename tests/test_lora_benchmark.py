"""The benchmark of adapters, and that of stored bases on the model it trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_script(name, *flags):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def rows(work):
    return run_script("lora.py", "--smoke", "--work-dir", work)["rows"]


@pytest.mark.slow
def test_full_training_and_adapters_side_by_side(work, rows):
    sft, full, lora = rows
    assert sft["kl"] == 0.0
    assert full["kl"] != lora["kl"]
    for row in (full, lora):
        assert row["optimizer_bytes"] > 2 * row["trained_bytes"]  # moments, counters
        assert 0 < row["update_s"] < row["step_s"]
    assert lora["trained_bytes"] < full["trained_bytes"]
    # Reference and reward model here; the bases of actor and critic are the same.
    assert lora["frozen_bytes"] == full["frozen_bytes"] == full["trained_bytes"]
    assert "| llama | rank 8 |" in (work / "smoke" / "lora.md").read_text("utf-8")


@pytest.mark.slow
def test_fewer_bits_change_little(work, rows):
    root = work / "smoke" / "llama"
    found = run_script(
        "base_storage.py",
        *("--model", root / "sft" / "model", "--limit", 16, "--max-tokens", 48),
        *("--data", root / "demonstrations_held_out.jsonl"),
    )["rows"]
    exact, half, small = found
    assert (exact["logit_error"], half["bytes"] * 2) == (0.0, exact["bytes"])
    assert small["bytes"] < exact["bytes"]
    for row in (half, small):
        assert 1e-5 < row["logit_error"] < 0.02
        assert row["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-3)

"""The benchmarks run, do the work they time, and end with one line of JSON."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",  # not the eight of the test suite
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compilations are counted
}


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


def run_smoke(script: str, *flags: str) -> tuple[list[str], dict]:
    done = run(script, "--smoke", *flags)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    result = json.loads(last)
    machine = result["machine"]
    assert machine["device"].startswith("cpu")
    assert machine["cores"] == os.cpu_count()
    assert machine["versions"]["jax"] and machine["processor"]
    return lines, result


@pytest.mark.slow
def test_gae_times_every_method_at_every_shape():
    lines, result = run_smoke("gae.py", "--shapes", "3x5", "2x17")
    assert [(row["batch"], row["length"]) for row in result["rows"]] == [
        (3, 5),
        (2, 17),
    ]
    optional = {"rlax", "torch"}
    installed = {name for name in optional if importlib.util.find_spec(name)}
    assert set(result["absent"]) == optional - installed
    for row in result["rows"]:
        methods = row["methods"]
        assert set(methods) == {"scan", "associative", "loop", "add"} | installed
        for name, found in methods.items():
            assert 0 < found["min_s"] <= found["median_s"] < 1, name
            assert found["samples"] >= 3
        # The first call compiles; that must not be among the timed ones.
        assert methods["scan"]["first_call_s"] > 10 * methods["scan"]["median_s"]
    assert any("associative" in line for line in lines)


@pytest.mark.slow
def test_gae_without_optional_packages(tmp_path):
    for name in ("rlax", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gae.py", "--smoke", "--shapes", "2x3"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["absent"] == {"rlax": "not installed", "torch": "not installed"}
    assert "not installed" in done.stdout.splitlines()[-2]


def test_gae_agreement_check_can_fail(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    gae = importlib.import_module("gae")
    rewards, values = gae.np.ones((2, 2, 3))
    expected = gae.numpy_loop(rewards, values)
    gae.check_agreement({"loop": lambda: expected}, expected)
    with pytest.raises(AssertionError, match="wrong"):
        gae.check_agreement({"wrong": lambda: expected + 0.01}, expected)


@pytest.mark.slow
def test_generate_counts_every_token():
    lines, result = run_smoke("generate.py", "--response", "5", "--family", "llama")
    (row,) = result["rows"]
    assert row["shape"]["response"] == 5 and row["shape"]["family"] == "llama"
    assert row["transformers"] is None
    ours = row["rlhf_jax"]
    # 8 answers of 5 tokens in `median_s` seconds.
    assert ours["new_tokens_per_s"] * ours["median_s"] == pytest.approx(40)
    assert ours["compile_s"] > ours["median_s"] > 0
    assert any("new tokens/s" in line for line in lines)


@pytest.mark.slow
def test_ppo_update_does_the_whole_update_and_compiles_once():
    _, result = run_smoke("ppo_update.py", "--no-trl", "--epochs", "3")
    assert result["trl"] is None and result["trl_over_rlhf_jax"] is None
    ours = result["rlhf_jax"]
    assert ours["optimizer_steps"] == 12  # 3 epochs × 4 minibatches
    assert ours["response_tokens"] == 64  # 8 answers of 8 tokens
    assert ours["compilations"] == 3  # rollout, score, update
    assert ours["recompilations"] == 0
    assert ours["first_update_s"] > ours["compile_s"] / 2 > ours["update_s"]
    assert 0 < ours["update_min_s"] <= ours["update_s"]
    phases = [ours[name] for name in ("rollout_s", "score_s", "optimize_s")]
    assert min(phases) > 0
    # Medians of two are means, which add up; fetching the metrics is the rest.
    assert 0.2 * ours["update_s"] < sum(phases) <= ours["update_s"]
    assert 1e8 < ours["peak_rss_bytes"] < 1e11


@pytest.mark.slow
def test_fused_logprobs_needs_less_memory():
    # 64 tokens a row: 4,096 tokens are four chunks, a quarter of all logits at once.
    _, result = run_smoke("fused_logprobs.py", "--shapes", "64x64x16x512")
    (row,) = result["rows"]
    for work in ("forward", "with_gradients"):
        fused, whole = (row[work][name] for name in ("fused", "whole"))
        assert 0 < fused["temporary_bytes"] < whole["temporary_bytes"], work
        assert min(fused["min_s"], whole["min_s"]) > 0


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("gae.py", ["--shapes", "512"], "'512': expected BxT"),
        ("ppo_update.py", ["--updates", "0"], "--updates 0 must be at least 1"),
        (
            "ppo_update.py",
            ["--batch", "30"],
            "batch=30 is not a multiple of minibatches=4",
        ),
        ("ppo_update.py", ["--trl-python", "/no/python"], "/no/python does not exist"),
        ("generate.py", ["--rounds", "0"], "--rounds 0 must be at least 1"),
    ],
)
def test_bad_flags_are_named(script, flags, message):
    done = run(script, *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


ECHO = """
import sys
sys.path.insert(0, BENCHMARKS)
from peer import Turns
turns = Turns()
print("a library's chatter")
turns.report({"ready": True})
for turn in range(2):
    turns.wait()
    turns.report({"turn": turn})
turns.wait()
raise ValueError("no more than two")
"""


def test_peer_answers_every_turn_and_its_failure_is_shown(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    peer = importlib.import_module("peer")
    script = tmp_path / "echo.py"
    script.write_text(ECHO.replace("BENCHMARKS", repr(str(BENCHMARKS))))
    with peer.Peer(Path(sys.executable), str(script), {}) as echo:
        assert echo.hello() == {"ready": True}
        assert [echo.take_turn(), echo.take_turn()] == [{"turn": 0}, {"turn": 1}]
        with pytest.raises(RuntimeError, match="no more than two"):
            echo.take_turn()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
def test_loading_stays_under_a_limit_of_the_kernel():
    _, result = run_smoke("load_checkpoint.py", "--headroom-mb", "150")
    loaded = [row for row in result["rows"] if row["loader"] == "pieces"]
    assert {(row["stored_as"], row["devices"]) for row in loaded} >= {
        ("float32", 1),
        ("bfloat16", 4),
    }
    for row in loaded:
        assert row["error"] is None
        assert row["file_bytes"] > 35e6
        assert row["peak_above_device_bytes"] < row["limit_bytes_above_device_bytes"]
    # bfloat16 is half as many bytes in the file as in float32 on the devices.
    widened = next(
        row
        for row in loaded
        if row["loaded_as"] == "float32" and row["stored_as"] == "bfloat16"
    )
    assert widened["device_bytes"] == 2 * widened["file_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
def test_the_limit_is_one():
    flags = ["--headroom-mb", "1", "--devices", "1"]
    _, result = run_smoke("load_checkpoint.py", *flags)
    assert all(row["error"] is not None for row in result["rows"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
def test_planned_memory_is_what_is_taken():
    _, result = run_smoke("planned_memory.py", "--stages", "sft")
    assert [row["stage"] for row in result["rows"]] == ["sft"]
    for row in result["rows"]:
        assert 0 < row["planned_always_bytes"] < row["planned_peak_bytes"]
        # So small that pages and threads count: a factor, not per cent.
        assert 0.5 < row["measured_over_planned"] < 2


@pytest.mark.slow
def test_checkpoint_cost_has_a_row_for_each_way():
    lines, result = run_smoke("checkpoint_cost.py")
    assert set(result["fastest"]) == {
        "no saving",
        "saving",
        "saving without checksums",
    }
    assert all(x > 0 for row in result["fastest"].values() for x in row.values())
    assert lines[0].startswith("state of 0.01 GB")

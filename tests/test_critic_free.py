"""The comparison of methods adds up its curves by hand-checked numbers, and runs."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture
def report():
    """The module `benchmarks/critic_free_report.py`."""
    return importlib.import_module("critic_free_report")


@pytest.fixture
def curves(report):
    def curve(method, seed, tokens, rates):
        return report.Curve(
            method=method,
            seed=seed,
            tokens=tokens,
            pass_at_1=rates,
            pass_at_4=[0.9] * len(rates),
            form_kept=[1.0] * len(rates),
            length=[20.0, *[30.0] * (len(rates) - 1)],
            seconds=50.0 + seed,
        )

    return [
        curve("ppo", 0, [0, 1_000, 2_000], [0.3, 0.5, 0.7]),
        curve("grpo", 0, [0, 1_000, 1_500], [0.3, 0.4, 0.6]),
        curve("ppo", 1, [0, 1_000, 2_000], [0.4, 0.4, 0.8]),
        curve("grpo", 1, [0, 1_000, 3_000], [0.4, 0.5, 0.9]),
    ]


def test_methods_are_compared_after_the_tokens_that_all_have_sampled(report, curves):
    ppo, grpo = report.summarize(curves)
    assert (ppo.method, grpo.method) == ("ppo", "grpo")
    assert ppo.tokens == grpo.tokens == 1_500  # GRPO's first seed has no more
    # Half way from 1,000 to 2,000: (0.5 + 0.7) / 2 and (0.4 + 0.8) / 2.
    assert ppo.end == pytest.approx([0.6, 0.6])
    assert ppo.gain == pytest.approx([30, 20])
    # A quarter of the way from 1,000 to 3,000: 0.5 + 0.4 / 4.
    assert grpo.end == pytest.approx([0.6, 0.6])
    assert grpo.seeds == [0, 1] and grpo.start == [0.3, 0.4]
    assert ppo.length == (20.0, 30.0) and ppo.seconds == [50.0, 51.0]


MACHINE = {
    "device": "cpu: cpu",
    "processor": "a processor",
    "cores": 2,
    "load_average": 0.25,
    "python": "3.11",
    "versions": {"jax": "0.10.2"},
    "commit": "abc",
    "command": "python critic_free.py",
}


def test_table(report, curves):
    text = report.markdown(report.summarize(curves), title="Title", machine=MACHINE)
    title, table, note, about = text.split("\n\n")
    assert title == "# Title"
    # Deviations of two values are their difference over √2: 10 / √2 = 7.1.
    assert table.splitlines()[2:] == [
        "| ppo | 35.0 ± 7.1 % | 60.0 ± 0.0 % | +25.0 ± 7.1 | +20.0 | 90.0 ± 0.0 % "
        "| 100.0 ± 0.0 % | 20.0 → 30.0 | 50 |",
        "| grpo | 35.0 ± 7.1 % | 60.0 ± 0.0 % | +25.0 ± 7.1 | +20.0 | 90.0 ± 0.0 % "
        "| 100.0 ± 0.0 % | 20.0 → 30.0 | 50 |",
    ]
    assert "after 1,500 sampled response tokens" in note
    assert "commit abc" in about and "load average 0.2" in about


def test_a_loss_has_a_minus_and_one_seed_no_spread(report, curves):
    curve = dataclasses.replace(curves[0], pass_at_1=[0.5, 0.4, 0.375])
    text = report.markdown(report.summarize([curve]), title="", machine=MACHINE)
    assert "| ppo | 50.0 % | 37.5 % | −12.5 | −12.5 | 90.0 % |" in text


def test_figure_of_several_seeds_and_of_one(report, curves, tmp_path):
    for number, shown in enumerate((curves, curves[:1])):
        path = tmp_path / f"{number}.png"
        report.draw(shown, path, title="Title")
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(data[16:20], "big") == 1760


def run_script(*flags):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "critic_free.py", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
    )


@pytest.mark.slow
def test_smoke_and_then_another_method(tmp_path):
    work = tmp_path / "work"

    def smoke(*methods):
        flags = ("--smoke", "--seeds", 1, "--work-dir", work, "--methods", *methods)
        done = run_script(*flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(done.stdout.splitlines()[-1])

    text, first = smoke("rloo")
    assert "rloo, reasoning, seed 0" in text
    text, second = smoke("rloo", "ppo")
    # What was done is not done again, nor is the model that both start from.
    assert "rloo, reasoning, seed 0" not in text and "ppo, reasoning, seed 0" in text
    assert [found["method"] for found in second["methods"]] == ["rloo", "ppo"]
    rloo, ppo = second["methods"]
    assert rloo["start"] == ppo["start"] == first["methods"][0]["start"]
    root = work / "smoke"
    lines = (root / "critic_free.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["method"] for row in rows] == ["rloo", "ppo"]
    for row in rows:
        # Two updates of 16 answers, of at most 48 tokens each.
        assert row["tokens"][0] == 0 < row["tokens"][1] < row["tokens"][2] <= 2 * 768
    assert rows[0]["tokens"] != rows[1]["tokens"]
    assert (root / "critic_free.md").read_text("utf-8").count("\n| ppo |") == 1
    assert (root / "critic_free.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--updates", "0"], "--updates 0 must be at least 1"),
        (["--methods", "dpo"], "invalid choice: 'dpo'"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    done = run_script(*flags, "--work-dir", tmp_path / "work")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "work").exists()

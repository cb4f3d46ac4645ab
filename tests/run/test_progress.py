"""A bar where somebody watches, a readable log where nobody does."""

import io

import jax
import pytest
from rich.console import Console

from rlhf_jax.run import progress as progress_module
from rlhf_jax.run.progress import heading, progress, warn


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_a_log_gets_the_first_line_the_last_and_one_per_ten_seconds(clock):
    file = io.StringIO()
    with progress(8, "ppo", start=2, console=Console(file=file)) as shown:
        for step in range(3, 9):
            clock.now += 4
            shown.update(step, {"score": 1 / step, "[red]": 1234567})
    # Lines at 4 s, 16 s (12 s later, as 8 s would be too early) and at the end, 24 s.
    # One step takes 4 s: 5 · 4 = 20 s to go after the first, 2 · 4 = 8 s after step 6.
    assert file.getvalue().splitlines() == [
        "ppo 3/8, 0:00:04 elapsed, 0:00:20 to go: score 0.3333  [red] 1.235e+06",
        "ppo 6/8, 0:00:16 elapsed, 0:00:08 to go: score 0.1667  [red] 1.235e+06",
        "ppo 8/8, 0:00:24 elapsed, 0:00:00 to go: score 0.125  [red] 1.235e+06",
    ]


def test_long_lines_of_a_log_are_not_broken(clock):
    file = io.StringIO()
    with progress(1, "x" * 200, console=Console(file=file, width=80)) as shown:
        shown.update(1)
    assert file.getvalue() == "x" * 200 + " 1/1, 0:00:00 elapsed, 0:00:00 to go\n"


def test_a_terminal_gets_a_bar():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with progress(8, "ppo", start=2, console=console) as shown:
        shown.update(5, {"score": 0.25})
    text = Console(file=io.StringIO()).render_str(file.getvalue()).plain
    assert "5/8" in text
    assert "score 0.25" in text
    assert "━" in text


def test_a_heading_is_text_not_markup():
    file = io.StringIO()
    heading("reward model [bold]", console=Console(file=file))
    assert file.getvalue() == "reward model [bold]\n"


def test_quiet_and_other_processes_print_nothing(capfd, monkeypatch):
    with progress(2, "ppo", quiet=True) as shown:
        shown.update(1, {"score": 1.0})
    heading("ppo", quiet=True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with progress(2, "ppo") as shown:
        shown.update(1, {"score": 1.0})
    heading("ppo")
    assert capfd.readouterr().out == ""


def test_a_warning_is_one_line_on_standard_error_of_the_first_process(
    capfd, monkeypatch
):
    warn("a metric is inf " + "x" * 200)
    assert capfd.readouterr() == ("", "warning: a metric is inf " + "x" * 200 + "\n")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    warn("a metric is inf")
    assert capfd.readouterr() == ("", "")

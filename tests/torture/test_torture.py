"""The short form of `make torture`: one command, killed a few times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    line = [sys.executable, SCRIPT, "--stage", "sft", "--kills", "4"]
    done = subprocess.run(
        [*line, "--work", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, _, row = done.stdout.splitlines()[1:4]
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["kills"] == "4"
    assert "| equal |" in row

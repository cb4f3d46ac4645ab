"""The exit codes of docs/exit-codes.md, from processes of the command line."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"

STUB = """
import os, signal, sys, time
from rlhf_jax import cli
from rlhf_jax.run.interrupt import Interruptible

def send(number):
    os.kill(os.getpid(), getattr(signal, number))

def run(self, config):
{body}

cli.Command.run = run
cli.main(["presets"])
"""


@pytest.fixture(autouse=True)
def hangups_arrive():
    """Also where the tests themselves run under nohup, which children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )


def stub(body):
    """The command line with another body of its command."""
    lines = [f"    {line}" for line in body.splitlines()]
    return python(STUB.format(body="\n".join(lines)))


def test_the_document_lists_the_codes():
    rows = re.findall(r"^\| (\d+) \|", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert rows == ["0", "1", "2", "3", "75", "129", "130", "143"]


@pytest.mark.parametrize(
    ("body", "code", "last_line"),
    [
        ("print('done')", 0, ""),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug"),
        ("raise BrokenPipeError", 1, ""),
        ("raise ValueError('data=x: no file')", 2, "rlhf-jax: error: data=x: no file"),
        ("raise OSError('full')", 2, "rlhf-jax: error: full"),
        ("send('SIGINT')", 130, ""),
        (
            "with Interruptible():\n    send('SIGINT')\n    send('SIGINT')",
            130,
            "Stopping after this step; only a second Ctrl-C stops immediately.",
        ),
        ("send('SIGTERM')\ntime.sleep(60)", 143, ""),
        ("send('SIGHUP')\ntime.sleep(60)", 129, ""),
        # A second one does not wait for what the first has begun to end.
        (
            "try:\n    send('SIGTERM')\n"
            "finally:\n    send('SIGTERM')\n    time.sleep(60)",
            -signal.SIGTERM,
            "",
        ),
    ],
)
def test_codes_around_a_command(body, code, last_line):
    done = stub(body)
    assert done.returncode == code
    assert (done.stderr.splitlines() or [""])[-1] == last_line


def test_an_ignored_hangup_stays_ignored():
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + STUB
    assert python(script.format(body="    send('SIGHUP')")).returncode == 0


TRAINING = """
import os, signal, sys
from rlhf_jax import cli
from rlhf_jax.run import report
from rlhf_jax.run.checkpointer import Checkpointer
from rlhf_jax.run.session import Session

how = sys.argv.pop(1)
log, save, wait = Session.log, Checkpointer.save, Checkpointer.wait
write_atomic, replace = report.write_atomic, os.replace

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)

def log_then_ask(self, step, metrics, *, shown):
    log(self, step, metrics, shown=shown)
    if step == 1 and how == "asked":
        send(signal.SIGTERM)

def save_while_asked(self, *arguments, **options):
    send(*[signal.SIGTERM, signal.SIGHUP, signal.SIGINT] * (how == "asked"))
    save(self, *arguments, **options)

def wait_while_asked(self):
    send(*[signal.SIGTERM] * (how == "asked"))
    wait(self)

def replace_while_asked(old, new):
    if how == "asked in the report" and str(new).endswith("report.html"):
        send(signal.SIGTERM)
    replace(old, new)

Session.log, os.replace = log_then_ask, replace_while_asked
Checkpointer.save, Checkpointer.wait = save_while_asked, wait_while_asked
cli.main()
"""


def test_codes_of_a_run(stages, tmp_path):
    run = tmp_path / "run"
    command = ["sft", "--run-dir", str(run), "--data", stages.sft.data]
    command += ["--model", f"{stages.sft.run_dir}/model", "--steps", "2"]
    command += ["--batch-size", "4", "--max-tokens", "96", "--eval-fraction", "0.2"]
    command += ["--checkpoint-every", "10", "--quiet"]

    done = python(TRAINING, "asked", *command)
    assert done.returncode == 75
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rlhf-jax: sft stopped after step 1 of 2; its checkpoint is")
    assert last.endswith(
        f"Resume with: rlhf-jax sft --config {run}/config.yaml --resume"
    )

    resume = ["sft", "--config", f"{run}/config.yaml", "--resume"]
    done = python(TRAINING, "asked in the report", *resume)
    assert done.returncode == 143
    names = [path.name for path in run.iterdir()]
    assert "model" in names and "report.html" not in names
    assert not [name for name in names if name.endswith(".tmp")]

    done = python(TRAINING, "undisturbed", *resume)
    assert done.returncode == 0
    assert (run / "report.html").exists()


def test_the_code_of_a_loss_that_is_not_finite(stages, tmp_path):
    command = ["sft", "--run-dir", str(tmp_path / "run"), "--data", stages.sft.data]
    command += ["--model", f"{stages.sft.run_dir}/model", "--steps", "3", "--quiet"]
    command += ["--batch-size", "4", "--max-tokens", "96", "--eval-fraction", "0.2"]
    command += ["--optimizer.learning-rate", "1e38"]
    command += ["--optimizer.warmup-fraction", "0"]
    environment = {**os.environ, "RLHF_JAX_TRACEBACK": ""}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.cli", *command],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("rlhf-jax: error: ")

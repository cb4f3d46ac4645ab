"""Signals become requests, then interruptions."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from rlhf_jax.run.interrupt import Interruptible

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def hangups_arrive():
    """Also where the tests themselves run under nohup, which children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ASKING)
def test_the_first_signal_asks(capfd, number):
    before = [signal.getsignal(n) for n in ASKING]
    with Interruptible() as interrupt:
        assert not interrupt.requested
        assert not interrupt.requested_anywhere()
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.requested_anywhere()
        notice = "Stopping after this step; only a second Ctrl-C stops immediately."
        assert notice in capfd.readouterr().err
    assert [signal.getsignal(n) for n in ASKING] == before


def test_only_a_second_ctrl_c_interrupts(capfd):
    with Interruptible() as interrupt:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert interrupt.requested
        assert capfd.readouterr().err.count("only a second Ctrl-C") == 4
        for _ in range(2):  # also a third, if the first is held up
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptible() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_hangup_nothing_is_printed_to_the_lost_terminal():
    script = """
import os, pty, signal
from rlhf_jax.run.interrupt import Interruptible

child, terminal = pty.fork()
if child == 0:
    with Interruptible() as interrupt:
        os.write(1, b"ready")
        while not interrupt.requested:  # until the terminal is closed
            signal.pause()
        print("to nobody", flush=True)
    os._exit(7)
seen = b""
while b"ready" not in seen:
    seen += os.read(terminal, 100)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), Interruptible():
        assert signal.getsignal(signal.SIGINT) != before
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) == before


def test_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with Interruptible() as interrupt:
            seen.extend([signal.getsignal(signal.SIGINT), interrupt.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, False]

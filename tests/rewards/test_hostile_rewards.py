"""Reward functions that fork, leave processes, write to the socket or fill memory."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax.rewards.functions import RewardFunctionError, RewardWorkers

REWARDS = """
import ctypes, json, multiprocessing, os, pickle, re, resource, signal, socket, struct
import subprocess, sys, threading, time


def length(prompts, responses, columns):
    return [len(response) for response in responses]


def forks(prompts, responses, columns):
    # The child comes back and answers as well, with another number.
    if "fork" not in responses:
        return length(prompts, responses, columns)
    child = os.fork()
    return [100 + bool(child)] * len(responses)


def forks_late(prompts, responses, columns):
    child = os.fork()
    if child == 0:
        time.sleep(0.5)
        return [100] * len(responses)
    return length(prompts, responses, columns)


def forks_well(prompts, responses, columns):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    # A child of multiprocessing can be terminated.
    context = multiprocessing.get_context("fork")
    other = context.Process(target=time.sleep, args=(60,))
    other.start()
    other.terminate()
    other.join(10)
    assert other.exitcode == -signal.SIGTERM
    return length(prompts, responses, columns)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def socket_of_the_run():
    for name in os.listdir("/proc/self/fd"):
        try:
            found = socket.socket(fileno=os.dup(int(name)))
            found.getpeername()
            return found
        except OSError:
            pass


def framed(data):
    return struct.pack(">I", len(data)) + data


def writes(prompts, responses, columns):
    # What the first prompt says; then it hangs, so that nothing else is written.
    reply = {"pid": os.getpid(), "job": 2, "outcome": [5.0] * len(responses)}
    nested = b"[" * 4000
    message = {
        "nothing": b"",
        "pickle": pickle.dumps(Touch(prompts[0])),
        "framed pickle": framed(pickle.dumps(Touch(prompts[0]))),
        "long": struct.pack(">I", 1 << 31),
        "false length": struct.pack(">I", 4000) + b"{",
        "half a length": b"\\0\\0",
        "a list": framed(b"[1]"),
        "deep": framed(nested),
        "digits": framed(b"1" * 4400),
        "another process": framed(json.dumps(reply | {"pid": 1}).encode()),
        "another job": framed(json.dumps(reply | {"job": 1}).encode()),
        "no job": framed(json.dumps({"pid": os.getpid()}).encode()),
        "rows": framed(json.dumps(reply | {"outcome": [5.0] * 99}).encode()),
        "types": framed(json.dumps(reply | {"outcome": [True]}).encode()),
    }[responses[0]]
    socket_of_the_run().sendall(message)
    time.sleep(60)


def holds_interpreter(prompts, responses, columns):
    # One call of C code that never releases the lock of the interpreter.
    leaves_session(prompts, responses, columns)
    re.match("(a+)+$", "a" * 60 + "b")


def leaves_session(prompts, responses, columns):
    command = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); "
    command += "time.sleep(600)"
    # The second has lost its parent too.
    again = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
    again += "sys.argv[2], sys.argv[1]], start_new_session=True)"
    path = prompts[0]
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {os.getppid()} ")
    for code in (command, again):
        line = [sys.executable, "-c", code, path, command]
        subprocess.Popen(line, start_new_session=True)
    while len(open(path).read().split()) < 4:
        time.sleep(0.01)
    if responses[0] == "hang":
        time.sleep(60)
    return [0] * len(responses)


def fills_memory(prompts, responses, columns):
    return [len(bytearray(int(response))) for response in responses]


def fills_memory_natively(prompts, responses, columns):
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    if malloc(ctypes.c_size_t(1 << 31)) is None:
        os.abort()
    return [0] * len(responses)
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "hostile.py"
    path.write_text(REWARDS, encoding="utf-8")
    return path


def workers(rewards, name, **options):
    settings = {"processes": 1, "time_limit": 60.0, "on_failure": -1.0} | options
    return RewardWorkers([f"{rewards}:{name}"], **settings)


def test_a_forked_child_that_returns_is_the_failure_of_its_call(rewards):
    with workers(rewards, "forks") as found:
        batch = found.score([""] * 2, ["fork", "ab"], {})
        # The rows were scored again, one at a time: the second is right.
        assert batch.scores.tolist() == [-1, 2]
        (line,) = batch.complaints
        assert line.endswith("forked, and the child returned too; end it with os._exit")
        for size in (1, 2, 3):  # each answer is of its own batch
            later = found.score([""], ["x" * size], {})
            assert later.scores.tolist() == [size] and not later.complaints


def test_a_forked_child_that_returns_later_is_not_heard(rewards):
    with workers(rewards, "forks_late") as found:
        for size in (1, 2, 3, 4):
            assert found.score([""], ["x" * size], {}).scores.tolist() == [size]
            time.sleep(0.2)


def test_children_that_end_are_no_failure(rewards):
    with workers(rewards, "forks_well", on_failure="stop") as found:
        assert found.score([""], ["abc"], {}).scores.tolist() == [3]


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("nothing", "took longer than 1 s"),
        # The protocol's first byte, 128, says that 2 GiB follow.
        (
            "pickle",
            r"wrote to the socket .*a message of 21\d+ bytes; at most 10000 are",
        ),
        ("framed pickle", r"wrote to the socket .*\(a message that is not JSON\)"),
        ("long", r"wrote to the socket .*2147483648 bytes; at most 10000 are due"),
        ("false length", "took longer than 1 s"),
        ("half a length", "took longer than 1 s"),
        ("a list", r"wrote to the socket .*that is not a JSON object"),
        ("deep", r"wrote to the socket .*that is not JSON"),
        ("digits", r"wrote to the socket .*that is not JSON"),
        ("another process", "took longer than 1 s"),
        ("another job", "took longer than 1 s"),
        ("no job", "took longer than 1 s"),
        ("rows", r"wrote to the socket .*without a result per row"),
        ("types", r"wrote to the socket .*with a row that is no score"),
    ],
)
def test_what_a_function_writes_to_the_socket(rewards, tmp_path, message, complaint):
    touched = tmp_path / "touched"
    with workers(rewards, "writes", time_limit=1.0, on_failure="stop") as found:
        start = time.monotonic()
        with pytest.raises(RewardFunctionError, match=f"row 0 .*: {complaint}") as told:
            found.score([str(touched)], [message], {})
        assert time.monotonic() - start < 20
    assert "\n" not in str(told.value)
    assert not touched.exists()


def living(path):
    """The processes noted in a file that have not ended."""
    found = map(int, path.read_text().split())
    return [process for process in found if os.path.exists(f"/proc/{process}")]


def end(path, seconds=20.0):
    """Whether they end within some time."""
    limit = time.monotonic() + seconds
    while living(path) and time.monotonic() < limit:
        time.sleep(0.05)
    return not living(path)


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")


@linux
@pytest.mark.parametrize("response", ["", "hang"])
def test_processes_in_sessions_of_their_own_end(rewards, tmp_path, response):
    path = tmp_path / "processes"
    with workers(rewards, "leaves_session", time_limit=3.0) as found:
        scores = found.score([str(path)], [response], {}).scores.tolist()
        # Called once more if it hangs; nothing of either call is left.
        assert len(path.read_text().split()) == (8 if response else 4)
        assert len(living(path)) == (0 if response else 4)
    assert scores == ([-1] if response else [0])
    assert end(path, 0.0)


@linux
@pytest.mark.parametrize("name", ["holds_interpreter", "leaves_session"])
def test_nothing_outlives_a_killed_run(rewards, tmp_path, name):
    path = tmp_path / "processes"
    script = (
        "from rlhf_jax.rewards.functions import RewardWorkers\n"
        f"with RewardWorkers([{f'{rewards}:{name}'!r}], processes=1, "
        f"time_limit=600) as workers: workers.score([{str(path)!r}], ['hang'], {{}})"
    )
    run = subprocess.Popen([sys.executable, "-c", script])
    while not path.exists() or len(path.read_text().split()) < 4:
        assert run.poll() is None
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert end(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_the_memory_limit(rewards):
    with workers(rewards, "fills_memory", memory_limit=0.5) as found:
        batch = found.score([""] * 2, ["1000", str(1 << 30)], {})
        assert batch.scores.tolist() == [1000, -1]
        assert batch.complaints[0].endswith(
            "MemoryError (hostile.py, line "
            f"{1 + REWARDS[: REWARDS.index('return [len(bytearray')].count(chr(10))}); "
            "--reward-memory-limit is 0.5 GiB: try more"
        )
    with workers(rewards, "fills_memory_natively", memory_limit=0.5) as found:
        (line,) = found.score([""], [""], {}).complaints
        assert line.endswith(
            "crashed its process: SIGABRT; --reward-memory-limit is 0.5 GiB: try more"
        )
    with workers(rewards, "fills_memory_natively") as found:
        assert not found.score([""], [""], {}).complaints
    with pytest.raises(RewardFunctionError, match=r"--reward-memory-limit is 0\.001"):
        with workers(rewards, "length", memory_limit=0.001):
            pass

"""Reward functions with odd habits, extreme scores, and what arrives in columns."""

import datetime
import decimal
import math
import os
import re
import signal
import threading
import zoneinfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhf_jax.data.row_files import read_rows
from rlhf_jax.rewards.frames import pack, unpack
from rlhf_jax.rewards.functions import RewardError, RewardFunctionError, RewardWorkers
from rlhf_jax.run.interrupt import Interruptible

REWARDS = r"""
import os, signal, sys, threading, time


def length(prompts, responses, columns):
    return [len(response) for response in responses]


def number(prompts, responses, columns):
    return [float(response) for response in responses]


def process(prompts, responses, columns):
    return [os.getpid()] * len(responses)


class Liar(list):
    def __len__(self):
        return 1

    def __getitem__(self, at):
        raise RuntimeError


class Half(float):
    def __float__(self):
        return 0.5

    def __repr__(self):
        return "[" * 10_000


class Shameless:
    def __repr__(self):
        raise RuntimeError("no")


class Rude(Exception):
    def __str__(self):
        raise KeyboardInterrupt


def odd(prompts, responses, columns):
    (habit,) = responses
    if habit == "lying list":
        return Liar([1, 2, 3])
    if habit == "lying float":
        return [Half(7)]
    if habit == "raises when shown":
        return [Shameless()]
    if habit == "raises in raising":
        raise Rude
    if habit == "escapes":
        raise ValueError("\x1b]52;c;ZXZpbA==\x07 \u202eabc\r \x9b2J")
    if habit == "long error":
        raise ValueError("\U0001f600" * 10_000)
    if habit == "recursion":
        return odd(prompts, responses, columns)
    if habit == "kills its parent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if habit == "closes everything":
        os.closerange(0, 256)
    if habit == "interrupts itself":
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    if habit == "sets an alarm":
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    if habit == "has threads":
        threading.Thread(target=time.sleep, args=(600,)).start()
    if habit == "prints much":
        print("x" * 200_000, file=sys.stderr)
    if habit == "is no list":
        return iter([1])
    if habit == "sleeps":
        time.sleep(0.5)
    return [1]


def shown(prompts, responses, columns):
    for values in zip(*columns.values()):
        print(*map(repr, values), sep="\n")
    return [0] * len(responses)
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(REWARDS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def scoring(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "odd.py"
    path.write_text(REWARDS, encoding="utf-8")
    specs = [f"{path}:odd"]
    with RewardWorkers(specs, processes=1, time_limit=20, on_failure=-1) as found:
        yield lambda habit: found.score([""], [habit], {})


@pytest.mark.parametrize(
    "habit",
    ["interrupts itself", "sets an alarm", "has threads", "prints much", "lying float"],
)
def test_what_is_no_failure(scoring, habit):
    expected = 0.5 if habit == "lying float" else 1.0
    assert scoring(habit).scores.tolist() == [expected]
    assert scoring("sleeps").complaints == ()  # nor of the next call


@pytest.mark.parametrize(
    ("habit", "complaint"),
    [
        ("lying list", "returned 3 numbers for 1 responses"),
        ("raises when shown", r"RuntimeError: no \(odd\.py, line \d+\)"),
        ("raises in raising", r"Rude: its text raises KeyboardInterrupt \(odd\.py.*"),
        (
            "escapes",
            r"ValueError: \\x1b\]52;c;ZXZpbA==\\x07 \\u202eabc \(odd\.py, line \d+\)",
        ),
        ("long error", "ValueError: \U0001f600{200} .*"),
        ("recursion", r"RecursionError: .*\(odd\.py, line \d+\)"),
        ("kills its parent", "crashed its process: SIGKILL"),
        ("closes everything", "closed its connection to the run"),
        ("is no list", "returned <list_iterator .*> instead of a list of numbers"),
    ],
)
def test_what_is_a_failure_of_its_row(scoring, habit, complaint):
    found = scoring(habit)
    assert found.scores.tolist() == [-1]
    (line,) = found.complaints
    assert line.isprintable()
    assert re.fullmatch(rf'.*odd, row 0 \(response "{habit}"\): {complaint}', line)
    assert scoring("").scores.tolist() == [1]


def test_a_call_ends_before_a_request_to_stop_is_followed(rewards, capfd):
    """Of the whole process group too, as schedulers send it."""
    with RewardWorkers([f"{rewards}:odd", f"{rewards}:process"], processes=1) as found:
        worker = int(found.score([""], [""], {}).by_function[1, 0])

        def send():
            os.kill(os.getpid(), signal.SIGTERM)
            os.killpg(worker, signal.SIGTERM)

        with Interruptible() as interrupt:
            timer = threading.Timer(0.2, send)
            timer.start()
            scores = found.score([""], ["sleeps"], {})
            timer.join()
            assert interrupt.requested
    assert scores.by_function.tolist() == [[1], [worker]]


def test_a_worker_that_stopped_cannot_hold_the_run(rewards):
    """Neither in taking a job that fills the socket, nor in ending."""
    specs = [f"{rewards}:length", f"{rewards}:process"]
    with RewardWorkers(specs, processes=1, time_limit=1.0) as found:
        worker = found.score([""], ["a"], {}).by_function[1, 0]
        os.kill(int(worker), signal.SIGSTOP)
        long = "x" * 10_000_000
        with pytest.raises(RewardFunctionError, match="took longer than 1 s; each of"):
            found.score([""], [long], {})
        assert found.score([""], [long], {}).by_function[0].tolist() == [10_000_000]


BOUND = r"scores go from -1e\+12 to 1e\+12: scale them in the function"


@pytest.mark.parametrize(
    ("score", "complaint"),
    [
        ("nan", "returned nan, which is not finite"),
        ("inf", "returned inf, which is not finite"),
        ("-inf", "returned -inf, which is not finite"),
        ("3.3e38", rf"returned 3\.3e\+38; {BOUND}"),
        ("-1e308", rf"returned -1e\+308; {BOUND}"),
        ("1.001e12", rf"returned 1\.001e\+12; {BOUND}"),
    ],
)
def test_an_extreme_score_is_named(rewards, score, complaint):
    with RewardWorkers([f"{rewards}:number"], processes=1) as found:
        message = rf'odd\.py:number, row 1 \(response "{score}"\): {complaint}$'
        with pytest.raises(RewardFunctionError, match=message):
            found.score([""] * 2, ["1", score], {})
        limits = found.score([""] * 2, ["1e12", "-1e12"], {}).scores
        assert limits.tolist() == [np.float32(1e12), np.float32(-1e12)]


def test_a_sum_that_is_too_large_is_named(rewards):
    specs = [f"{rewards}:number", f"{rewards}:length"]
    with RewardWorkers(specs, weights=[1e6, 2.0], processes=1) as found:
        message = (
            r'the reward of row 1 \(response "3e11"\) is 3e\+17 = 1e\+06 · 3e\+11 of '
            r".*odd\.py:number \+ 2 · 4 of .*odd\.py:length; rewards go from "
            r"-1e\+12 to 1e\+12: scale the function or --reward-weights down"
        )
        with pytest.raises(RewardError, match=message) as told:
            found.score([""] * 2, ["1", "3e11"], {})
        assert "\n" not in str(told.value)
        # 10⁶ · 2 + 2 · 1
        assert found.score([""], ["2"], {}).scores.tolist() == [2_000_002]


VALUES = [
    *(None, True, 0, -1, 10**400, 1.5, 5e-324, math.inf, "", "ä\ud800\x00\u2028"),
    *([], {}, [[], [None]], {"a": {"b": [1, {"c": 2.0}]}}, {"dict": [], "bytes": "aa"}),
    *(
        (1, ("a", b"\x00\xff")),
        b"",
        decimal.Decimal("1.50"),
        datetime.date(2024, 2, 29),
    ),
    *(datetime.datetime(1, 1, 1, 0, 0, 0, 1), datetime.time(23, 59, 59, 5)),
    datetime.datetime(2024, 7, 1, tzinfo=datetime.UTC),
    datetime.datetime(2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    datetime.timedelta(days=-3, microseconds=7),
]


def test_columns_arrive_as_they_are(rewards, capfd):
    values = [*VALUES, float("nan")]
    with RewardWorkers([f"{rewards}:shown"], processes=1) as found:
        found.score([""] * len(values), [""] * len(values), {"x": values})
    lines = capfd.readouterr().out.splitlines()
    assert lines == [repr(value) for value in values]
    assert [unpack(pack(value)) for value in VALUES] == VALUES


def test_columns_of_parquet_files_arrive_as_they_are(tmp_path):
    zone = pa.timestamp("us", "Europe/Berlin")
    table = pa.table(
        {
            "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
            "struct": pa.array([{"x": [1.5, None]}]),
            "bytes": pa.array([b"\xff"]),
            "decimal": pa.array([decimal.Decimal("-0.10")]),
            "time": pa.array([1_700_000_000_000_000], zone),
            "length": pa.array([5], pa.duration("us")),
            "half": pa.array([np.float16(0.5)]),
            "words": pa.array(["a"]).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    found = {name: unpack(pack(value)) for name, value in row.values.items()}
    assert repr(found) == repr(row.values)
    assert found["map"] == [("a", 1)] and found["half"] == 0.5


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def test_arrays_are_lists_and_other_values_are_refused(rewards):
    array = np.array([[1, 2], [3, 4]], np.int8)
    assert pack(array) == [[1, 2], [3, 4]] and pack(np.float32(0.5)) == 0.5
    assert unpack(pack(nested(200))) == nested(200)
    with RewardWorkers([f"{rewards}:length"], processes=1) as found:
        for value, problem in [
            (object(), "a value of type object"),
            (nested(201), "lists and dictionaries nested more than 200 deep"),
        ]:
            message = f'^column "x", rows 0 to 1: {problem} cannot be given to a reward'
            with pytest.raises(ValueError, match=message):
                found.score([""] * 2, ["a", "b"], {"x": [1, value]})
        assert found.score([""], ["abc"], {"x": [1]}).scores.tolist() == [3]

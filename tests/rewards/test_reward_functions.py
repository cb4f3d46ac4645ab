"""Functions of every kind of badness, and what becomes of their rows."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rlhf_jax.rewards.functions import RewardFunctionError, RewardWorkers

REWARDS = """
import fcntl, os, subprocess, sys, time

def length(prompts, responses, columns):
    return [len(response) for response in responses]

def level(prompts, responses, columns):
    return tuple(level / 2 for level in columns["level"])

def calls(prompts, responses, columns):
    return [len(prompts)] * len(responses)

def fails_on_b(prompts, responses, columns):
    print("not to be taken for an answer")
    return [int(response.replace("b", "x")) for response in responses]

def nan_on_b(prompts, responses, columns):
    return [float("nan") if "b" in response else 1 for response in responses]

def skips_b(prompts, responses, columns):
    return [1 for response in responses if "b" not in response]

def hangs_on_b(prompts, responses, columns):
    while any("b" in response for response in responses):
        time.sleep(60)
    return [len(response) for response in responses]

def dies_on_b(prompts, responses, columns):
    if any("b" in response for response in responses):
        os._exit(3)
    return [len(response) for response in responses]

def segfaults_on_b(prompts, responses, columns):
    if any("b" in response for response in responses):
        os.kill(os.getpid(), 11)
    return [len(response) for response in responses]

def exits_on_b(prompts, responses, columns):
    if any("b" in response for response in responses):
        sys.exit("no more\\nof this")
    return [len(response) for response in responses]

def fails_on_two(prompts, responses, columns):
    assert len(responses) == 1, "one at a time"
    return [1]

def holds_lock(prompts, responses, columns):
    # The lock is held until this process and the other have ended.
    lock = open(prompts[0], "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write("held")
    lock.flush()
    subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    time.sleep(60)

def sleeps(prompts, responses, columns):
    time.sleep(float(prompts[0]))
    return [len(response) for response in responses]

def notes_calls(prompts, responses, columns):
    with open(prompts[0], "a") as file:
        file.write("".join(responses) + " ")
    return fails_on_b(prompts, ["b" if r == "b" else "1" for r in responses], columns)

def has_jax(prompts, responses, columns):
    return ["jax" in sys.modules for _ in responses]

def accelerators(prompts, responses, columns):
    import jax
    return [jax.config.jax_platforms != "cpu" for _ in responses]
"""

RESPONSES = "abcde"  # five responses, of which the second is bad


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return path


def score(path, *names, responses=RESPONSES, columns=None, **options):
    specs = [f"{path}:{name}" for name in names]
    settings = {"processes": 1, "time_limit": 60.0, **options}
    with RewardWorkers(specs, **settings) as workers:
        return workers.score([""] * len(responses), responses, columns or {})


def becomes_free(lock, seconds=20.0):
    """Whether nobody holds the lock, within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return True
    return False


def test_scores_are_weighted_sums_in_order(rewards):
    responses = ["", "a", "ab", "abc", "abcd", "abcde", "abcdef"]
    columns = {"level": [2, 0, 0, 4, 0, 0, -2], "answer": list("1234567")}
    for processes in (1, 3, 9):  # fewer workers than rows, and more
        scored = score(
            rewards,
            "length",
            "level",
            weights=[1.0, -10.0],
            responses=responses,
            columns=columns,
            processes=processes,
        )
        assert scored.scores.dtype == scored.by_function.dtype == np.float32
        # length - 10 · level / 2
        assert scored.scores.tolist() == [-10, 1, 2, 3 - 20, 4, 5, 6 + 10]
        assert scored.by_function.tolist() == [
            [0, 1, 2, 3, 4, 5, 6],
            [1, 0, 0, 2, 0, 0, -1],
        ]
        assert scored.failures.tolist() == [0, 0] and scored.complaints == ()


def test_a_batch_is_divided_evenly(rewards):
    scored = score(rewards, "calls", responses="abcdefghij", processes=4)
    assert scored.scores.tolist() == [2, 2, 3, 3, 3, 2, 2, 3, 3, 3]
    assert score(rewards, "calls", responses="").scores.shape == (0,)


FAILURES = [
    ("fails_on_b", r"ValueError: invalid literal for int.*\(my_rewards\.py, line 15\)"),
    ("nan_on_b", "returned nan, which is not finite"),
    ("skips_b", "returned 0 numbers for 1 responses"),
    ("hangs_on_b", "took longer than 1 s"),
    ("dies_on_b", "crashed its process: exit code 3"),
    ("segfaults_on_b", "crashed its process: SIGSEGV"),
    ("exits_on_b", r"SystemExit: no more \(my_rewards\.py, line \d+\)"),
]


@pytest.mark.parametrize(("name", "complaint"), FAILURES)
def test_a_failing_row_stops_the_run_and_is_named(rewards, name, complaint):
    responses = ["10", "200", "b" * 200, "b", "30"]
    row = rf"row 2 \(response \"{'b' * 76}\.\.\.\): "
    with pytest.raises(RewardFunctionError, match=f"^.*{name}, {row}{complaint}$"):
        score(rewards, "length", name, responses=responses, time_limit=1.0)


@pytest.mark.parametrize(("name", "complaint"), FAILURES)
def test_a_failing_row_gets_the_stated_value(rewards, name, complaint):
    responses = ["10", "b", "b\n2", "300", "4"]
    scored = score(
        rewards,
        "length",
        name,
        responses=responses,
        processes=2,
        time_limit=1.0,
        on_failure=-7.0,
    )
    right = {
        "fails_on_b": [10, 300, 4],
        "nan_on_b": [1, 1, 1],
        "skips_b": [1, 1, 1],
    }.get(name, [2, 3, 1])
    first, *others = right
    assert scored.by_function.tolist() == [[2, 1, 3, 3, 1], [first, -7, -7, *others]]
    assert scored.failures.tolist() == [0, 2]
    assert len(scored.complaints) == 2
    assert f'{name}, row 2 (response "b\\n2"): ' in scored.complaints[1]


def test_workers_go_on_after_failures(rewards):
    with RewardWorkers(
        [f"{rewards}:hangs_on_b"], processes=2, time_limit=1.0
    ) as workers:
        for bad in (3, 0):
            responses = ["a", "aa", "aaa", "aaaa"]
            responses[bad] = "b"
            with pytest.raises(RewardFunctionError, match=f"hangs_on_b, row {bad} "):
                workers.score([""] * 4, responses, {})
        scored = workers.score([""] * 4, ["a", "aa", "aaa", "aaaa"], {})
        assert scored.scores.tolist() == [1, 2, 3, 4]


def test_rows_are_scored_again_up_to_the_first_bad_one(rewards, tmp_path):
    prompts, responses = [str(tmp_path / "calls")] * 5, ["a", "b", "c", "b", "d"]
    spec = f"{rewards}:notes_calls"
    with RewardWorkers([spec], processes=1) as workers:
        with pytest.raises(RewardFunctionError, match="row 1 "):
            workers.score(prompts, responses, {})
    assert (tmp_path / "calls").read_text() == "abcbd a b "
    with RewardWorkers([spec], processes=1, on_failure=-1) as workers:
        scored = workers.score(prompts, responses, {})
    assert scored.scores.tolist() == [1, -1, 1, -1, 1]
    assert (tmp_path / "calls").read_text() == "abcbd a b abcbd a b c b d "


def test_an_interrupted_call_leaves_no_answer_behind(rewards):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with RewardWorkers([f"{rewards}:sleeps"], processes=1) as workers:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                workers.score(["2"], ["a"], {})
            assert workers.score(["0"], ["abc"], {}).scores.tolist() == [3]
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_batch_that_fails_only_as_a_whole(rewards):
    message = (
        r"fails_on_two, rows 0 to 4 in one call: AssertionError: one at a time \(.*\); "
        "each of these rows is scored correctly on its own"
    )
    with pytest.raises(RewardFunctionError, match=message):
        score(rewards, "fails_on_two")
    scored = score(rewards, "fails_on_two", on_failure=0.0)
    assert scored.scores.tolist() == [1] * 5 and scored.failures.tolist() == [0]


def test_unusable_functions_are_refused_on_entering(rewards):
    with pytest.raises(RewardFunctionError, match=r"my_rewards\.py has no lenght"):
        score(rewards, "length", "lenght", processes=2)
    dead = rewards.parent / "dead.py"
    dead.write_text("import os\nos._exit(4)")
    with pytest.raises(
        RewardFunctionError,
        match=r"dead\.py:f: importing crashed its process: exit code 4",
    ):
        score(dead, "f")


def test_what_a_killed_worker_started_ends_with_it(rewards, tmp_path):
    lock = tmp_path / "lock"
    with RewardWorkers(
        [f"{rewards}:holds_lock"], processes=1, time_limit=1.0, on_failure=0.0
    ) as workers:
        assert workers.score([str(lock)], ["a"], {}).failures.tolist() == [1]
        assert lock.read_text() == "held" and becomes_free(lock)


def test_workers_end_when_the_run_is_killed(rewards, tmp_path):
    lock = tmp_path / "lock"
    script = (
        "from rlhf_jax.rewards.functions import RewardWorkers\n"
        f"with RewardWorkers([{str(rewards) + ':holds_lock'!r}], processes=1, "
        f"time_limit=60) as workers: workers.score([{str(lock)!r}], ['a'], {{}})"
    )
    run = subprocess.Popen([sys.executable, "-c", script])
    while not (lock.exists() and lock.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert becomes_free(lock)


def test_modules_of_the_working_directory_are_found(rewards, monkeypatch):
    monkeypatch.chdir(rewards.parent)
    with RewardWorkers(["my_rewards:length"], processes=1) as workers:
        assert workers.score([""], ["abc"], {}).scores.tolist() == [3]


def test_workers_load_jax_only_for_those_who_ask(rewards, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    supplied = "from rlhf_jax.tasks.verifiable import exact_answer\n"
    rewards.write_text(supplied + REWARDS)
    assert score(rewards, "has_jax", responses="a").scores.tolist() == [0]
    asking = "from rlhf_jax import KLOptions, __version__\n"
    rewards.write_text(supplied + asking + REWARDS)
    by_function = score(rewards, "has_jax", "accelerators", responses="a").by_function
    assert by_function.tolist() == [[1], [0]]
    spec = "rlhf_jax.tasks.verifiable:exact_answer"
    with RewardWorkers([spec], processes=1) as workers:
        columns = {"answer": ["5", "7"]}
        assert workers.score(["", ""], ["6", "is 7."], columns).scores.tolist() == [
            0,
            1,
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"specs": []}, "no reward function is named"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 reward functions"),
        ({"weights": [float("nan")]}, r"weights=\[nan\]"),
        ({"processes": 0}, "processes=0"),
        ({"time_limit": 0.0}, r"time_limit=0\.0"),
        ({"time_limit": float("inf")}, "time_limit=inf"),
        ({"time_limit": 1e10}, r"time_limit=1.*: give seconds above 0, at most 604800"),
        ({"weights": [1e300]}, r"weights=\[1e\+300\]: give numbers from -1e\+12 to 1e"),
        ({"on_failure": 1e308}, r"on_failure=1e\+308.*from -1e\+12 to 1e\+12"),
        ({"memory_limit": 0.0}, r"memory_limit=0\.0: give GiB above 0"),
        (
            {"memory_limit": 1e300},
            r"memory_limit=1e\+300: give GiB above 0, at most 1e",
        ),
        ({"memory_limit": float("nan")}, "memory_limit=nan"),
        ({"on_failure": "skip"}, 'on_failure="skip": give "stop" or the score'),
        ({"on_failure": float("nan")}, "on_failure=NaN"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        RewardWorkers(**{"specs": ["a.py:f"], **options})


def test_rows_must_be_complete(rewards):
    with RewardWorkers([f"{rewards}:length"], processes=1) as workers:
        with pytest.raises(ValueError, match="2 prompts, 1 responses, 2 level do"):
            workers.score(["", ""], ["a"], {"level": [1, 2]})
        with pytest.raises(ValueError, match="1 prompts, 1 responses, 0 prompts do"):
            workers.score([""], ["a"], {"prompts": []})
    with pytest.raises(ValueError, match="inside the `with` block"):
        workers.score([""], ["a"], {})

"""What is accepted as a reward function, and as what it returns."""

import sys
import textwrap
from fractions import Fraction

import numpy as np
import pytest

from rlhf_jax.rewards.loading import RewardFunctionError, load_reward_function
from rlhf_jax.rewards.worker import outcome

REWARDS = """
def length(prompts, responses, columns):
    return [len(response) for response in responses]

def level(prompts, responses, columns):
    return tuple(level / 2 for level in columns["level"])

number = 3
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _same_path(monkeypatch):
    """What loading in this process adds to `sys.path` goes again."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "give a reward as file.py:function or package.module:function"),
        (":length", "give a reward as"),
        ("{file}:", "give a reward as"),
        ("{file}:a-b", "give a reward as"),
        ("{folder}/nowhere.py:length", r"no such file: /.*nowhere\.py"),
        ("{folder}/broken.py:f", r"failed: SyntaxError: .*\(broken\.py, line 2\)"),
        (
            "{folder}/raises.py:f",
            r"importing .*raises\.py failed: ZeroDivisionError: division by zero "
            r"\(raises\.py, line 4\)$",
        ),
        (
            "{folder}/unknown.py:f",
            r"ModuleNotFoundError: No module named 'no_such_library' \(unknown\.py, l",
        ),
        ("{folder}/exits.py:f", r"failed: SystemExit: 2 \(exits\.py, line 2\)"),
        ("no_such.module:f", "failed: ModuleNotFoundError: No module named 'no_such'"),
        ("json:dump_it", r"json has no dump_it; did you mean dumps?\?"),
        ("{file}:lenght", r"my_rewards\.py has no lenght; did you mean length\?"),
        ("{file}:number", r"not a function but a value \(int\)"),
        (
            "{folder}/shapes.py:two",
            r"takes \(responses, columns\): too many positional",
        ),
        ("{folder}/shapes.py:four", r"missing a required .*'tokenizer'"),
        ("{folder}/shapes.py:later", "an async function or a generator"),
        ("{folder}/shapes.py:yields", "an async function or a generator"),
    ],
)
def test_what_cannot_be_loaded(rewards, spec, message):
    files = {
        "broken": "\ndef f(:\n",
        "raises": "\ndef g():\n    pass\n1 / 0",
        "unknown": "import no_such_library",
        "exits": "import sys\nsys.exit(2)",
        "shapes": """
            def two(responses, columns): return []
            def four(prompts, responses, columns, tokenizer): return []
            async def later(prompts, responses, columns): return []
            def yields(prompts, responses, columns): yield 1
        """,
    }
    for name, text in files.items():
        (rewards.parent / f"{name}.py").write_text(textwrap.dedent(text))
    full = spec.format(file=rewards, folder=rewards.parent)
    with pytest.raises(RewardFunctionError, match=message) as caught:
        load_reward_function(full)
    assert str(caught.value).startswith(f"{full}: ")
    assert "\n" not in str(caught.value)


def test_files_and_modules_are_loaded(rewards, monkeypatch):
    length = load_reward_function(f"{rewards}:length")
    assert length([""], ["abc"], {}) == [3]
    # One file is one module, and it finds its neighbours.
    other = load_reward_function(f"{rewards}:level")
    assert other.__globals__ is length.__globals__
    (rewards.parent / "other_rewards.py").write_text(
        "import my_rewards as m\nf = m.level"
    )
    by_file = load_reward_function(f"{rewards.parent}/other_rewards.py:f")
    assert by_file([""], ["a"], {"level": [3]}) == (1.5,)
    # Callables that are no functions, defaults, and relative paths.
    (rewards.parent / "more.py").write_text(
        "import functools\n"
        "def f(prompts, responses, columns, scale=2): return [scale for _ in prompts]\n"
        "g = functools.partial(f, scale=3)\n"
    )
    monkeypatch.chdir(rewards.parent)
    assert load_reward_function("more.py:f")(["a"], ["b"], {}) == [2]
    assert load_reward_function("more.py:g")(["a"], ["b"], {}) == [3]
    supplied = load_reward_function("rlhf_jax.tasks.verifiable:exact_answer")
    assert supplied([""], ["it is 5"], {"answer": ["5"]}) == [1.0]


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (False, 0.0),
        (3, 3.0),
        (-0.5, -0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(1.5), 1.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (3.3e38, 3.3e38),
        (None, "returned None, which is not a number"),
        ("1.0", "returned '1.0', which is not a number"),
        ([1.0], "returned [1.0], which is not a number"),
        (np.array([1.0]), "returned [1.0], which is not a number"),
        (1j, "returned 1j, which is not a number"),
        # The run judges these.
        (float("-inf"), float("-inf")),
        (1e39, 1e39),
        (10**400, float("inf")),
    ],
)
def test_what_counts_as_a_number(value, score):
    job = (["a", "b"], ["c", "d"], {})
    assert outcome(lambda *batch: [0, value], *job) == [0.0, score]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (np.array([1, 0]), [1.0, 0.0]),
        (np.array([True, False]), [1.0, 0.0]),
        ((1, 0), [1.0, 0.0]),
        (0.5, "returned 0.5 instead of a list of numbers"),
        (None, "returned None instead of a list of numbers"),
        ("10", "returned '10' instead of a list of numbers"),
        ({1: 2, 3: 4}, "returned {1: 2, 3: 4} instead of a list of numbers"),
        ([1], "returned 1 numbers for 2 responses"),
        ([], "returned 0 numbers for 2 responses"),
        (np.zeros((3, 2)), "returned 3 numbers for 2 responses"),
    ],
)
def test_what_counts_as_a_list(result, expected):
    assert outcome(lambda *batch: result, ["a"] * 2, ["b"] * 2, {}) == expected

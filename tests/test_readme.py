"""Every Python example of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["arrays", "own model"])
def test_example_runs(example, capsys):
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("[[")
    assert "nan" not in printed

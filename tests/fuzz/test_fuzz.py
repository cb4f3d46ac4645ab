"""A short form of `make fuzz`: some hundred inputs for each reader."""

import random

import pytest
from fuzz.fuzz_targets import TARGETS, Finding, Runner
from fuzz.run_fuzz import mutated
from fuzz.structures import run_examples

FAST = [name for name in TARGETS if name != "template"]


@pytest.fixture
def run(request):
    runner = Runner(request.param)
    yield runner
    runner.close()


@pytest.mark.parametrize(("name", "run"), [(n, n) for n in FAST], indirect=["run"])
def test_mutations(name, run):
    draw = random.Random(0)
    for _ in range(300):
        run(mutated(draw, TARGETS[name].seeds))


@pytest.mark.parametrize("name", FAST)
def test_structures(name):
    _, error, _ = run_examples(name, count=50)
    assert error is None


@pytest.mark.parametrize("run", ["config"], indirect=True)
def test_another_exception_is_a_finding(run, monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.families.table.FAMILIES", {"gpt2": 3})
    run(b"[]")
    with pytest.raises(Finding, match="AttributeError"):
        run(b'{"model_type": "gpt2"}')

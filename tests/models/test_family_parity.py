"""Every family computes what its PyTorch class computes, and its files go both ways."""

import importlib.util
import sys
from pathlib import Path

import pytest

from rlhf_jax.models.families import FAMILIES

pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A module of the benchmarks, which are scripts beside each other."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


load("timing")
CASES = load("family_cases").CASES
parity = load("family_parity")


def test_every_family_has_a_case():
    assert {case.family for case in CASES.values()} == set(FAMILIES)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    found = parity.compare(CASES[name], tmp_path)
    # Whole modules in float32; what was seen is at most 1e-5 of each.
    assert found.logits < 5e-5
    assert found.hidden < 5e-5
    assert found.values < 5e-5
    assert found.scores < 5e-5
    assert found.gradients < 1e-4
    assert found.greedy == 1.0
    assert found.round_trip
    # Both round to 8 bits, in other places: neither is far better than the other.
    assert 0.5 < found.bfloat16 < 1.3

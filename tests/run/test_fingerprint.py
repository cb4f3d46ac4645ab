"""What tells one set of weights from another."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.run.run_directory import check_run, fingerprint, open_run


@pytest.fixture
def weights(tmp_path):
    """Writes `name` with a number for every weight, a megabyte of them."""

    def write(name, value, file="model.safetensors"):
        (tmp_path / name).mkdir(exist_ok=True)
        weights = np.full(2**18, value, np.float32)
        save_file({"x": weights}, tmp_path / name / file)
        return tmp_path / name

    return write


def test_copies_have_one_and_others_another(weights):
    assert fingerprint(weights("a", 1.0)) == fingerprint(weights("b", 1.0))
    assert fingerprint(weights("a", 1.0)) != fingerprint(weights("b", 1.5))
    other_name = weights("c", 1.0, file="model-00001-of-00001.safetensors")
    assert fingerprint(weights("a", 1.0)) != fingerprint(other_name)


def test_directories_without_weights_have_none(tmp_path):
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "nowhere") == ""


def test_a_run_goes_on_from_the_weights_it_began_with(weights, tmp_path):
    def start(policy, *, resume, run=open_run):
        found = {"policy": fingerprint(policy)}
        run(tmp_path / "run", {"a": 1}, stage="ppo", resume=resume, weights=found)

    start(weights("policy", 1.0), resume=False)
    start(weights("policy", 1.0), resume=True)
    with pytest.raises(ValueError, match="the weights of policy have changed"):
        start(weights("policy", 1.5), resume=True, run=check_run)
    start(weights("policy", 1.0), resume=True)

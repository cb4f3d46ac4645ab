"""Pure functions also get strict dtypes and ranks; optax's Adam could not pass here."""

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def mask():
    """Right-padded responses of 1, 4 and 7 tokens in 7 columns."""
    return np.arange(7) < np.array([1, 4, 7])[:, None]

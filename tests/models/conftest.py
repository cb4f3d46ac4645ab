"""Batches and forward passes shared by the tests of the models."""

from functools import partial

import jax
import numpy as np
import pytest


@partial(jax.jit, static_argnums=0)
def forward(module, params, tokens, mask):
    return module.apply({"params": params}, tokens, mask)


@pytest.fixture(scope="session")
def run():
    """Head outputs as NumPy; compiled once per module and shape."""
    return lambda *args: np.asarray(forward(*args))


@pytest.fixture(scope="session")
def batch():
    """Left-padded rows of 24, 15, 2 and 1 tokens; padding holds ordinary ids."""
    tokens = np.random.default_rng(7).integers(2, 40, (4, 24)).astype(np.int32)
    mask = np.arange(24) >= 24 - np.array([[24], [15], [2], [1]])
    return tokens, mask

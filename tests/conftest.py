"""Strict settings for every test."""

import os
import tempfile

import jax
import pytest

pytest_plugins = ["tiny_stages"]

# Tests spend their time in compiling programs that run once, on tiny arrays: slower
# code that is ready sooner. Flags of the user come last and win.
_flags = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later ones have lost this flag and stop at it
    _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for anything

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # sharding tests need no accelerator
jax.config.update("jax_numpy_rank_promotion", "warn")

# Several tests run the same stages: compile their programs once per worker process.
_cache = tempfile.TemporaryDirectory(prefix="rlhf_jax_xla_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(params=["eager", "jit"])
def maybe_jit(request):
    """Runs the test twice: on the function as written, and on `jax.jit` of it."""
    return jax.jit if request.param == "jit" else lambda fn: fn

"""Strict settings for every test."""

import ctypes
import gc
import math
import os
import sys
from pathlib import Path

import jax
import program_cache
import pytest

pytest_plugins = ["tiny_stages"]

# Tests spend their time in compiling programs that run once, on tiny arrays: slower
# code that is ready sooner. Flags of the user come last and win.
_flags = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later ones have lost this flag and stop at it
    _flags += " --xla_cpu_use_fusion_emitters=false"
_users = os.environ.get("XLA_FLAGS", "").removeprefix(_flags)  # a worker is told them
os.environ["XLA_FLAGS"] = f"{_flags} {_users.strip()}"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for anything

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # sharding tests need no accelerator
jax.config.update("jax_numpy_rank_promotion", "warn")

# Programs are kept between runs, but for those that compile as fast as they load.
_own = program_cache.open_own(program_cache.kept_folder())
_kept = {
    "jax_compilation_cache_dir": str(_own),
    "jax_compilation_cache_max_size": -1,
    "jax_persistent_cache_min_compile_time_secs": 0.05,
    "jax_persistent_cache_enable_xla_caches": "none",  # their path is part of the key
}
for _key, _value in _kept.items():
    jax.config.update(_key, _value)
# Commands that tests start may be killed while they write: nothing of theirs is kept.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_own / "commands")

# Imports take 0.75e9. Within a file programs are kept for longer: the next test most
# likely runs them again.
MOST_BYTES_AFTER_A_FILE, MOST_BYTES_WITHIN = 1.0e9, 1.4e9


def resident_bytes() -> float:
    """Memory that this process occupies; infinite where it cannot be known."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_programs() -> None:
    """Frees compiled programs, and gives the memory back to the system."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's only
        if trim is not None:
            trim(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between tests, so that no test sees its own programs disappear."""
    last_of_file = nextitem is None or nextitem.path != item.path
    limit = MOST_BYTES_AFTER_A_FILE if last_of_file else MOST_BYTES_WITHIN
    resident = resident_bytes()
    if resident > limit and (resident < math.inf or last_of_file):
        forget_programs()


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not visit it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    program_cache.close_own(_own)


@pytest.fixture(params=["eager", "jit"])
def maybe_jit(request):
    """Runs the test twice: on the function as written, and on `jax.jit` of it."""
    return jax.jit if request.param == "jit" else lambda fn: fn

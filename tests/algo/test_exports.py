"""What `import rlhf_jax` offers, and what it loads."""

import inspect
import subprocess
import sys

import rlhf_jax

HEAVY = ("flax", "optax", "orbax", "transformers", "grain", "rlax", "torch")


def test_everything_in_all_exists_and_is_sorted():
    assert list(rlhf_jax.__all__) == sorted(rlhf_jax.__all__)
    for name in rlhf_jax.__all__:
        assert callable(getattr(rlhf_jax, name)), name


def test_every_function_says_what_it_takes_and_returns():
    for name in rlhf_jax.__all__:
        item = getattr(rlhf_jax, name)
        if not isinstance(item, type):
            assert "Returns:" in item.__doc__, name
            assert "Args:" in item.__doc__ or not inspect.signature(item).parameters


def test_import_loads_nothing_heavy():
    code = f"import rlhf_jax, sys; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"

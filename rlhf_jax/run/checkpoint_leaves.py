"""The leaves of a state as a checkpoint stores them: a flat mapping by path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, for example `params/actor/kernel`, in tree order.

    Files contain this flat mapping, so they do not depend on the classes of the state,
    and errors can name the leaf.
    """
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(
                f"two leaves of the state are named {name!r}; rename a key"
            )
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe_leaf(name: str, leaf: Any) -> dict[str, Any]:
    """Shape and dtype, and the implementation of a key, for comparison.

    Raises:
        ValueError: if the leaf is no array.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"leaf {name!r} of the state is {leaf!r}; a state must contain only arrays"
        )
    description = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        description["key_impl"] = str(jax.random.key_impl(leaf))
    return description


def storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves for Orbax: keys as integers, without empty arrays (it rejects them)."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in leaves.items()
        if np.prod(leaf.shape) > 0
    }


def target(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Target shape, dtype and sharding of each stored array."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {}
    for name, leaf in leaves.items():
        if np.prod(leaf.shape) == 0:
            continue
        plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        sharding = _sharding(leaf)
        target[name] = jax.ShapeDtypeStruct(
            plain.shape,
            plain.dtype,
            sharding=default if sharding is None else sharding,
        )
    return target


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    if isinstance(leaf, jax.Array) and leaf.committed:
        return leaf.sharding
    return None


def restored_leaf(like: Any, stored: Any, description: Mapping[str, Any]) -> jax.Array:
    """A leaf with the sharding of `like`, from what was stored."""
    sharding = _sharding(like)
    if stored is None:
        stored = np.zeros(like.shape, like.dtype)  # empty, so it was not stored
    if sharding is None:
        # Committed to one device, it could not be combined with arrays on a mesh.
        stored = jax.device_put(np.asarray(stored))
    elif not isinstance(stored, jax.Array):
        stored = jax.device_put(stored, sharding)
    if _is_key(like):
        return jax.random.wrap_key_data(stored, impl=description["key_impl"])
    return stored


def check_same_leaves(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path
) -> None:
    """Raises ValueError naming the first leaf whose descriptions differ."""

    def shown(description: Mapping[str, Any] | None) -> str:
        if description is None:
            return "missing"
        return f"{description['dtype']}{description['shape']}"

    names = list(dict.fromkeys([*wanted, *stored]))
    unequal = [
        name for name in names if shown(stored.get(name)) != shown(wanted.get(name))
    ]
    if unequal:
        name = unequal[0]
        more = f" ({len(unequal) - 1} more leaves differ)" if unequal[1:] else ""
        raise ValueError(
            f"checkpoint {path} has a different state: leaf {name!r} is "
            f"{shown(stored.get(name))} there and {shown(wanted.get(name))} here{more}"
        )

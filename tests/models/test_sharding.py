import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from rlhf_jax.models import parameter_sharding


def mesh(fsdp, names=("data", "fsdp", "tensor")):
    return jax.make_mesh((8 // fsdp, fsdp, 1), names, axis_types=(AxisType.Auto,) * 3)


def specs(shapes, fsdp):
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return jax.tree.map(lambda s: s.spec, parameter_sharding(mesh(fsdp), tree))


def test_largest_divisible_dimension_is_split():
    assert specs({"a": (8, 16), "b": (16, 8), "c": (50, 12), "d": (5, 7)}, 4) == {
        "a": PartitionSpec(None, "fsdp"),
        "b": PartitionSpec("fsdp"),
        "c": PartitionSpec(None, "fsdp"),  # 4 does not divide 50
        "d": PartitionSpec(),
    }


def test_layers_are_never_split_over_devices():
    # The optimizer's copy of the parameters is placed like the parameters.
    state = {"layers": {"kernel": (64, 8, 8), "bias": (64, 6)}, "count": ()}
    want = {
        "layers": {"kernel": PartitionSpec(None, "fsdp"), "bias": PartitionSpec()},
        "count": PartitionSpec(),
    }
    assert specs(state, 4) == want
    assert specs({"mu": state, "nu": state}, 4) == {"mu": want, "nu": want}


def test_one_device_per_parameter_means_no_split():
    assert specs({"a": (8, 16)}, 1) == {"a": PartitionSpec()}


def test_mesh_without_the_axis():
    with pytest.raises(ValueError, match=r"mesh axes are .*'fsdp'"):
        parameter_sharding(mesh(2, ("data", "model", "tensor")), {})

"""Joined and alternating leaves, against arrays put together by hand."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models.families import TensorRule
from rlhf_jax.models.hf.safetensors_files import (
    TensorToWrite,
    open_tensors,
    write_tensors,
)
from rlhf_jax.models.hf.tensor_layout import (
    LeafSource,
    StoredTensor,
    leaf_pieces,
    stored_array,
)

HEADS, HEAD_DIM, WIDTH, LAYERS = 3, 4, 5, 2
OUT = HEADS * HEAD_DIM
NAMES = ("query", "key", "value")
KERNELS = tuple(f"layers/{name}/kernel" for name in NAMES)
BIASES = tuple(f"layers/{name}/bias" for name in NAMES)


def neox(leaves, layout="transposed"):
    """As GPT-NeoX fuses them: rows are [heads, 3, head_dim]."""
    return TensorRule(name="", leaves=leaves, layout=layout, block=HEAD_DIM)


def source_of(rule, place, shape, pattern="h.{layer}.weight"):
    return LeafSource(
        pattern=pattern,
        rule=rule,
        place=place,
        offset=place * shape[-1],
        shape=shape,
        dtype=np.float32,
    )


def leaves():
    rng = np.random.default_rng(0)
    kernels = {k: rng.normal(size=(LAYERS, WIDTH, OUT)) for k in KERNELS}
    biases = {k: rng.normal(size=(LAYERS, OUT)) for k in BIASES}
    return {k: x.astype(np.float32) for k, x in (kernels | biases).items()}


def fused_by_hand(parts):
    """`[out]` or `[in, out]` of query, key, value → `[heads · 3 · head_dim(, in)]`."""
    rows = []
    for head in range(HEADS):
        for part in parts:
            for i in range(HEAD_DIM):
                rows.append(part[..., head * HEAD_DIM + i])
    return np.stack(rows)


def read(source, tensors, index, piece_bytes):
    """The part `index`, put together from its pieces."""
    shape = np.zeros(source.shape)[index].shape
    part, times = np.zeros(shape, np.float32), np.zeros(shape, int)
    for piece in leaf_pieces(source, tensors, index, piece_bytes):
        values = piece.values.T if piece.is_turned else piece.values
        values = values[None] if piece.is_stacked else values
        assert values.nbytes <= piece_bytes or len(piece.values) == 1
        at = tuple(
            slice(s, s + n) for s, n in zip(piece.start, values.shape, strict=True)
        )
        part[at] = values
        times[at] += 1
    assert (times == 1).all()
    return part


@pytest.fixture
def fused(tmp_path):
    parts = leaves()
    stored = {}
    for i in range(LAYERS):
        stored[f"h.{i}.weight"] = fused_by_hand([parts[k][i] for k in KERNELS])
        stored[f"h.{i}.bias"] = fused_by_hand([parts[k][i] for k in BIASES])
        # Nobody stores this one, but it is what "same" would mean.
        stored[f"h.{i}.turned"] = np.ascontiguousarray(stored[f"h.{i}.weight"].T)
    save_file(stored, tmp_path / "model.safetensors")
    with open_tensors(tmp_path) as tensors:
        yield tensors, parts


@pytest.mark.parametrize("piece_bytes", [1, 60, 1 << 20])
@pytest.mark.parametrize("place", range(3))
def test_leaves_that_alternate_head_by_head(fused, place, piece_bytes):
    tensors, parts = fused
    shape = (LAYERS, WIDTH, OUT)
    kernel = source_of(neox(KERNELS), place, shape)
    turned = source_of(neox(KERNELS, "same"), place, shape, "h.{layer}.turned")
    bias = source_of(neox(BIASES, "same"), place, (LAYERS, OUT), "h.{layer}.bias")
    # All of it; a device's part, in the middle of a head; one layer, one column.
    for index in [
        (slice(None), slice(None), slice(None)),
        (slice(None), slice(1, 4), slice(3, 9)),
        (slice(1, 2), slice(None), slice(11, 12)),
    ]:
        want = parts[KERNELS[place]][index]
        np.testing.assert_array_equal(read(kernel, tensors, index, piece_bytes), want)
        np.testing.assert_array_equal(read(turned, tensors, index, piece_bytes), want)
        index = (index[0], index[2])
        want = parts[BIASES[place]][index]
        np.testing.assert_array_equal(read(bias, tensors, index, piece_bytes), want)


@pytest.mark.parametrize("as_jax", [False, True])
def test_leaves_that_alternate_are_written_so(fused, as_jax):
    tensors, parts = fused
    given = jax.tree.map(jax.numpy.asarray, parts) if as_jax else parts
    for layer in range(LAYERS):
        for rule, name in [
            (neox(KERNELS), "weight"),
            (neox(BIASES, "same"), "bias"),
            (neox(KERNELS, "same"), "turned"),
        ]:
            want = tensors.view(f"h.{layer}.{name}")
            stored = StoredTensor(rule=rule, layer=layer, shape=want.shape)
            np.testing.assert_array_equal(stored_array(stored, given), want)


def test_pieces_follow_the_file(fused):
    tensors, _ = fused
    # Rows of the file are columns of the leaf: 12 rows of 20 bytes, three at a time.
    rule = TensorRule(name="", leaves=KERNELS, layout="transposed")
    source = source_of(rule, 1, (LAYERS, WIDTH, OUT))
    everything = (slice(None),) * 3
    pieces = list(leaf_pieces(source, tensors, everything, 70))
    assert [piece.start for piece in pieces] == [
        (layer, 0, row) for layer in range(LAYERS) for row in (0, 3, 6, 9)
    ]
    whole = tensors.view("h.1.weight")
    np.testing.assert_array_equal(pieces[-1].values, whole[21:24])
    assert np.shares_memory(pieces[-1].values, whole)  # nothing was copied


def test_nothing_is_written_while_arrays_are_gathered(tmp_path):
    computed = []

    def compute():
        computed.append(1)
        return np.zeros(2, np.float32)

    tensor = TensorToWrite(shape=(2,), dtype=np.float32, compute=compute)
    write_tensors(None, {"a": tensor, "b": tensor}, max_shard_bytes=8)
    assert computed == [1, 1]


def test_one_tensor_at_a_time_is_computed(tmp_path):
    # What is written before the next is asked for is in the file already.
    sizes = []

    def compute(value):
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
        return np.full((1 << 20,), value, np.float32)

    tensors = {
        str(i): TensorToWrite(
            shape=(1 << 20,), dtype=np.float32, compute=lambda i=i: compute(i)
        )
        for i in range(3)
    }
    write_tensors(tmp_path, tensors, max_shard_bytes=1 << 30)
    assert sizes[1] > 4 << 20  # the first, and the header
    assert sizes[2] - sizes[1] == 4 << 20
    assert (tmp_path / "model.safetensors").stat().st_size % 64 == 0
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: x[-1] for name, x in stored.items()} == {"0": 0, "1": 1, "2": 2}

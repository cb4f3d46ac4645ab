"""Tensors reach their devices in pieces, with every bit, and nothing else in memory."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import load_pretrained, save_pretrained
from rlhf_jax.models.hf import leaf_placement
from rlhf_jax.models.hf.leaf_placement import (
    Piece,
    count_not_finite,
    place_leaf,
    to_host,
)
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama

FILE = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def random_bits(rng, shape, dtype):
    """Any finite value, subnormal ones and both zeros included."""
    dtype = np.dtype(dtype)
    word = f"u{dtype.itemsize}"
    bits = rng.integers(0, 2 ** (8 * dtype.itemsize), shape, dtype=word)
    values = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # among them are signalling NaNs
        return np.where(np.isfinite(values), values, dtype.type(0))


def fill_with_bits(directory, dtype):
    """A checkpoint of random bits, and what it holds."""
    rng = np.random.default_rng(3)
    tensors = {
        name: random_bits(rng, x.shape, dtype)
        for name, x in load_file(directory / FILE).items()
    }
    save_file(tensors, directory / FILE)
    return tensors


def assert_same_bits(ours, theirs):
    ours = np.asarray(ours)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_array_equal(
        *(np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (ours, theirs))
    )


def check_llama(params, stored, dtype):
    """Against the file, by hand."""
    for leaf, name in [("query", "q_proj"), ("value", "v_proj"), ("output", "o_proj")]:
        for i in range(2):
            want = stored[f"model.layers.{i}.self_attn.{name}.weight"].T
            assert_same_bits(params["layers"][leaf]["kernel"][i], want.astype(dtype))
    norms = [stored[f"model.layers.{i}.input_layernorm.weight"] for i in range(2)]
    want = np.stack(norms).astype(dtype)
    assert_same_bits(params["layers"]["attention_norm"]["scale"], want)
    head = stored["lm_head.weight"].T.astype(dtype)
    assert_same_bits(params["output_embedding"], head)
    embedding = stored["model.embed_tokens.weight"].astype(dtype)
    assert_same_bits(params["token_embedding"], embedding)


@pytest.mark.parametrize("piece_bytes", [1, 1500, 1 << 30])
@pytest.mark.parametrize(
    ("stored_as", "wanted"),
    [
        (np.float32, np.float32),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float16, np.float16),
        (ml_dtypes.bfloat16, np.float32),
        (np.float16, np.float32),
    ],
)
def test_every_bit_arrives_in_pieces_of_any_size(
    stored_as, wanted, piece_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", piece_bytes)
    save_pretrained(tmp_path, *tiny_llama(vocab_size=40))
    stored = fill_with_bits(tmp_path, stored_as)
    _, params = load_pretrained(tmp_path, dtype=wanted)
    check_llama(params, stored, wanted)


def test_narrowing_rounds_alike_in_pieces_and_at_once(tmp_path, monkeypatch):
    save_pretrained(tmp_path, *tiny_llama(vocab_size=40))
    _, at_once = load_pretrained(tmp_path, dtype=jnp.bfloat16)
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", 1500)
    _, in_pieces = load_pretrained(tmp_path, dtype=jnp.bfloat16)
    want = load_file(tmp_path / FILE)[QUERY].T.astype(ml_dtypes.bfloat16)
    assert_same_bits(at_once["layers"]["query"]["kernel"][1], want)
    jax.tree.map(np.testing.assert_array_equal, in_pieces, at_once)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_pieces_on_a_mesh(make, tmp_path, monkeypatch):
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", 1500)
    module, params = make()
    save_pretrained(tmp_path, module, params)
    mesh = jax.make_mesh(
        (2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    _, loaded = load_pretrained(tmp_path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    kernel = loaded["layers"]["key"]["kernel"]
    assert len(kernel.addressable_shards) == 4  # two parts, each on two devices
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 2


def test_parts_on_several_devices_are_read_once():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = []

    def pieces_of(index, piece_bytes):
        asked.append((index, piece_bytes))
        yield Piece(
            name="t",
            values=np.arange(6.0, dtype=np.float32).reshape(3, 2),
            is_turned=True,
            is_stacked=False,
            start=(0, 0),
        )

    everywhere = jax.NamedSharding(mesh, jax.P())
    array = place_leaf((2, 3), np.float32, everywhere, pieces_of)
    assert len(asked) == 1
    np.testing.assert_array_equal(array, [[0, 2, 4], [1, 3, 5]])
    assert {shard.device for shard in array.addressable_shards} == set(
        mesh.devices.flat
    )


def test_parameters_outlive_the_file(tmp_path, monkeypatch):
    # Data begin at a multiple of 64 bytes, where JAX would take arrays as they lie.
    module, params = tiny_gpt2()
    save_pretrained(tmp_path, module, params)
    _, at_once = load_pretrained(tmp_path)
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", 1500)
    _, in_pieces = load_pretrained(tmp_path)
    with (tmp_path / FILE).open("r+b") as file:
        file.write(b"\0" * (tmp_path / FILE).stat().st_size)
    jax.tree.map(np.testing.assert_array_equal, at_once, params)
    jax.tree.map(np.testing.assert_array_equal, in_pieces, params)


# Values that are none


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_that_are_no_numbers_are_counted(dtype):
    info = jnp.finfo(dtype)
    fine = [0.0, -0.0, info.max, -info.max, info.tiny, info.smallest_subnormal, 1.0]
    wrong = [np.nan, -np.nan, np.inf, -np.inf]
    values = np.array([fine + [1.0] * 4, wrong + fine], dtype)
    assert count_not_finite(values, dtype) == 4
    assert count_not_finite(values[:1], dtype) == 0
    assert count_not_finite(values.T[1::2], dtype) == 2  # columns 1 and 3
    assert count_not_finite(np.zeros((0, 3), dtype), dtype) == 0
    many = np.ones((700_000, 3), dtype)  # more than is looked at in one go
    many[[0, 350_000, 699_999], 2] = np.nan
    assert count_not_finite(many, dtype) == 3


def test_values_that_another_dtype_cannot_hold_are_counted():
    # The largest float16 is 65504; half a step on, from 65520, all is infinite.
    values = np.array([65504.0, 65519.0, 65520.0, -1e6, np.nan], np.float32)
    assert count_not_finite(values, np.float16) == 3
    assert count_not_finite(values, ml_dtypes.bfloat16) == 1


@pytest.mark.parametrize("piece_bytes", [1500, 1 << 30])
def test_a_tensor_with_nan_is_named(piece_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", piece_bytes)
    save_pretrained(tmp_path, *tiny_llama())
    tensors = load_file(tmp_path / FILE)
    tensors[QUERY][[3, 30], [1, 2]] = np.nan, np.inf
    save_file(tensors, tmp_path / FILE)
    message = rf"{FILE}: tensor {QUERY} has 2 of 1024 values that are NaN or infinite"
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert "more)" not in str(error.value)
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"in float16.* \(and 1 more\)"):
        load_pretrained(tmp_path, dtype=jnp.float16)


def test_headers_come_before_data(tmp_path, monkeypatch):
    save_pretrained(tmp_path, *tiny_llama())
    tensors = load_file(tmp_path / FILE)
    tensors[QUERY][0, 0] = np.nan
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / FILE)
    monkeypatch.setattr(leaf_placement, "place_leaf", None)
    with pytest.raises(ValueError, match=r"model\.norm\.weight .*missing$"):
        load_pretrained(tmp_path)


# To the host


def test_large_arrays_come_to_the_host_in_pieces(monkeypatch):
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", 100)
    values = np.arange(7 * 5, dtype=np.float32).reshape(7, 5)
    array = jnp.array(values)
    np.testing.assert_array_equal(to_host(array), values)
    np.testing.assert_array_equal(to_host(array, 3), values[3])
    assert array._npy_value is None  # no copy was left on it


@pytest.mark.parametrize("piece_bytes", [300, 1 << 30])
def test_every_bit_goes_back_from_a_mesh(piece_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(leaf_placement, "PIECE_BYTES", piece_bytes)
    save_pretrained(tmp_path / "bits", *tiny_llama(vocab_size=40))
    stored = fill_with_bits(tmp_path / "bits", np.float32)
    mesh = jax.make_mesh(
        (2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    module, params = load_pretrained(tmp_path / "bits", mesh=mesh)
    assert not params["token_embedding"].is_fully_replicated
    save_pretrained(tmp_path / "again", module, params)
    again = load_file(tmp_path / "again" / FILE)
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert_same_bits(again[name], tensor)


def test_layers_on_different_devices():
    mesh = jax.make_mesh((4,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,))
    values = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    array = jax.device_put(values, jax.NamedSharding(mesh, jax.P("layers")))
    for layer in range(8):
        np.testing.assert_array_equal(to_host(array, layer), values[layer])

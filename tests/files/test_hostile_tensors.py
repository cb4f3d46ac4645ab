"""Tensor files, adapters and places that attack whoever reads them."""

import json
import os
import re
import socket
import struct

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from files.hostile_fields import ADAPTER, BIG, GPT2, LLAMA, changed
from files.test_hostile_inputs import refused, written
from safetensors.numpy import save_file

from rlhf_jax.data.row_files import read_rows
from rlhf_jax.files.regular_file import read_text
from rlhf_jax.models import load_pretrained, load_tokenizer, save_pretrained
from rlhf_jax.models.families import read_config
from rlhf_jax.models.hf.checkpoint import open_checkpoint
from rlhf_jax.models.hf.peft_files import read_adapter, write_adapter
from rlhf_jax.models.hf.safetensors_files import open_tensors
from rlhf_jax.models.lora import LoraOptions, init_adapters
from rlhf_jax.models.tiny import tiny_gpt2, tiny_llama


def tensors(header, data=b"\0" * 16, length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SHARDS = {
    "nothing": b"",
    "short": b"abc",
    "no length": b"\0" * 7,
    "length 0": tensors(b""),
    "length 2 ** 63": tensors({}, length=2**63),
    "length beyond": tensors({"x": entry()}, length=10_000),
    "header no JSON": tensors(b"hello"),
    "header a list": tensors([1]),
    "header null": tensors(b"null"),
    "header deep": tensors(b"[" * 200_000),
    "header deep objects": tensors(b'{"a":' * 200_000),
    "header latin-1": tensors(b'{"\xe9": 1}'),
    "header half a character": tensors(b'{"\\ud800": 1}'),
    "header of 33 MB": tensors(b" " * 34_000_000),
    "name twice": tensors(
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "entry a list": tensors({"x": [1]}),
    "entry null": tensors({"x": None, "y": entry()}),
    "entry empty": tensors({"x": {}}),
    "dtype a list": tensors({"x": entry(dtype=["F32"])}),
    "dtype unknown": tensors({"x": entry(dtype="F33")}),
    "shape a text": tensors({"x": entry() | {"shape": "4"}}),
    "shape negative": tensors({"x": entry(shape=(-4,))}),
    "shape half": tensors({"x": entry(shape=(4.0,))}),
    "shape true": tensors({"x": entry(shape=(True,))}),
    "shape 2 ** 70": tensors({"x": entry(shape=(2**70,))}),
    "shape that overflows": tensors({"x": entry(shape=(2**32, 2**32))}),
    "shape with 0 that overflows": tensors({"x": entry(shape=(2**47, 2**47, 2**47))}),
    "offsets beyond": tensors({"x": entry(shape=(8,), offsets=(0, 32))}),
    "offsets backwards": tensors({"x": entry(offsets=(16, 0))}),
    "offsets negative": tensors({"x": entry(offsets=(-16, 0))}),
    "offsets three": tensors({"x": entry(offsets=(0, 8, 16))}),
    "offsets a text": tensors({"x": entry() | {"data_offsets": "ab"}}),
    "offsets 2 ** 64": tensors({"x": entry(offsets=(2**64 - 16, 2**64))}),
    "overlap": tensors({"x": entry(), "y": entry()}),
    "half overlap": tensors(
        {
            "x": entry(shape=(3,), offsets=(0, 12)),
            "y": entry(shape=(2,), offsets=(8, 16)),
        }
    ),
    "a gap": tensors({"x": entry(shape=(1,), offsets=(8, 12))}),
    "data left over": tensors({"x": entry()}, b"\0" * 32),
    "wrong size": tensors({"x": entry(shape=(3,))}),
    "metadata a list": tensors({"__metadata__": [1], "x": entry()}),
    "metadata nested": tensors({"__metadata__": {"a": {}}, "x": entry()}),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shard(tmp_path, name):
    written(tmp_path / "model.safetensors", SHARDS[name])

    def read():
        with open_tensors(tmp_path):
            pass

    assert str(tmp_path) in refused(read)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_pretrained(directory / "gpt2", *tiny_gpt2())
    save_pretrained(directory / "llama", *tiny_llama())
    return directory


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt2", {"n_layer": 3}),
        ("gpt2", {"n_layer": 1000}),
        ("gpt2", {"n_layer": 10**6}),
        ("gpt2", {"n_layer": BIG}),
        ("gpt2", {"vocab_size": 2**24}),
        ("gpt2", {"n_embd": 2**24, "n_head": 2**22}),
        ("gpt2", {"n_positions": 2**30}),
        ("gpt2", {"n_inner": 2**24}),
        ("gpt2", {"n_layer": 1}),
        ("llama", {"num_hidden_layers": 1000}),
        ("llama", {"num_hidden_layers": 10**6}),
        ("llama", {"head_dim": 2**24}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_attention_heads": 2**24, "num_key_value_heads": 2**24}),
        ("llama", {"intermediate_size": 2**24}),
        ("llama", {"hidden_size": 2**24}),
    ],
    ids=str,
)
def test_sizes_that_the_tensors_have_not(saved, tmp_path, family, fields):
    for file in (saved / family).iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((saved / family / "config.json").read_text()) | fields
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    os.link(saved / family / "model.safetensors", tmp_path / "model.safetensors")
    written(tmp_path / "config.json", json.dumps(config))
    assert str(tmp_path) in refused(lambda: load_pretrained(tmp_path))


@pytest.mark.parametrize("layers", [1000, 10**6])
def test_layers_are_counted_before_a_model_is_planned(saved, tmp_path, layers):
    os.link(saved / "gpt2" / "model.safetensors", tmp_path / "model.safetensors")
    written(tmp_path / "config.json", changed(GPT2, n_layer=layers))
    message = refused(lambda: open_checkpoint(tmp_path).config)
    assert "layers" in message or "n_layer" in message


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


PLACES = {
    "a pipe": _fifo,
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "an endless text": lambda path: path.symlink_to("/dev/stdin"),
    "a socket": _socket,
    "a link to a password": lambda path: path.symlink_to("/etc/passwd"),
    "a link up": lambda path: path.symlink_to("../secret"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
READERS = {
    "config.json": read_config,
    "model.safetensors": lambda path: open_tensors(path).__enter__(),
    "model.safetensors.index.json": lambda path: open_tensors(path).__enter__(),
    "tokenizer.json": load_tokenizer,
    "chat_template.jinja": load_tokenizer,
    "train.jsonl": lambda path: list(read_rows(path / "train.jsonl")),
    "train.jsonl.gz": lambda path: list(read_rows(path / "train.jsonl.gz")),
    "train.parquet": lambda path: list(read_rows(path / "train.parquet")),
    "template": lambda path: read_text(path / "template", most_bytes=2**20),
}


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_read(tmp_path, name, place):
    written(tmp_path / "secret", "a secret")
    directory = tmp_path / "model"
    directory.mkdir()
    PLACES[place](directory / name)
    if name == "template" and place in ("a link to a password", "a link up"):
        return  # an option may name any file
    message = refused(lambda: READERS[name](directory))
    assert str(directory) in message and "secret" not in message


def test_links_inside_a_directory_and_in_the_cache_of_the_hub(tmp_path):
    blob = written(tmp_path / "hub" / "blobs" / "1234", json.dumps(LLAMA))
    snapshot = tmp_path / "hub" / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(os.path.relpath(blob, snapshot))
    assert read_config(snapshot)[1].num_layers == 2
    inner = tmp_path / "model"
    written(inner / "real.json", json.dumps(LLAMA))
    (inner / "config.json").symlink_to("real.json")
    assert read_config(inner)[1].num_layers == 2


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    "found",
    [
        {},
        {A: np.zeros((0, 32), np.float32), B: np.zeros((32, 0), np.float32)},
        {A: np.zeros((), np.float32), B: np.zeros((), np.float32)},
        {A: np.zeros(32, np.float32), B: np.zeros(32, np.float32)},
        {A: np.zeros((2, 32, 1), np.float32), B: np.zeros((32, 2, 1), np.float32)},
        {A: np.zeros((2, 32), np.int32), B: np.zeros((32, 2), np.int32)},
        {A: np.zeros((2, 32), np.bool_), B: np.zeros((32, 2), np.bool_)},
        {A: np.zeros((2, 31), np.float32), B: np.zeros((32, 2), np.float32)},
        {A: np.zeros((2, 32), np.float32), B: np.zeros((32, 3), np.float32)},
        {A: np.zeros((2, 32), np.float32)},
        {A: np.full((2, 32), np.inf, np.float32), B: np.zeros((32, 2), np.float32)},
        {A: np.zeros((2, 32), np.float32), B: np.full((32, 2), np.nan, np.float32)},
        {"\x1b[2J": np.zeros((2, 2), np.float32)},
        {A.replace(".0.", ".7."): np.zeros((2, 32), np.float32)},
        {A.replace(".0.", ".\u0663."): np.zeros((2, 32), np.float32)},
        {"base_model.model.score.weight": np.zeros((0, 32), np.float32)},
    ],
    ids=range(16),
)
def test_adapter(tmp_path, found):
    written(tmp_path / "adapter_config.json", json.dumps(ADAPTER))
    save_file(found, tmp_path / "adapter_model.safetensors")
    module, _ = tiny_llama()
    assert str(tmp_path) in refused(lambda: read_adapter(tmp_path, module))


def test_what_is_not_finite_is_not_saved(tmp_path):
    module, params = tiny_gpt2()
    kernel = params["layers"]["up"]["kernel"]
    params["layers"]["up"]["kernel"] = kernel.at[1, 0, 0].set(np.inf)
    message = refused(lambda: save_pretrained(tmp_path / "model", module, params))
    assert "h.1.mlp.c_fc.weight has 1 of 4096 values" in message
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    module, params = tiny_llama()
    options = LoraOptions(rank=2, targets=("query",))
    trained = init_adapters(jax.random.key(0), params, options)
    pair = trained["layers"]["query"]
    pair["lora_b"] = pair["lora_b"].at[1, 0, 3].set(np.nan)
    message = refused(
        lambda: write_adapter(tmp_path / "a", module, trained, options, base="")
    )
    assert re.search(r"layers\.1\.self_attn\.q_proj\.lora_B\.weight has 1 of", message)
    assert list(tmp_path.iterdir()) == []


def _parquet(path, table, **options):
    pyarrow.parquet.write_table(pyarrow.table(table), path, **options)


def test_parquet_of_another_encoding(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"good", b"\xe9"], pyarrow.binary()).view(pyarrow.string())
    _parquet(path, {"text": texts})
    assert "not UTF-8" in refused(lambda: list(read_rows(path)))


def test_parquet_with_more_rows_than_bytes(tmp_path):
    path = tmp_path / "a.parquet"
    _parquet(path, {"text": pyarrow.array([None] * 2_000_000, pyarrow.null())})
    assert "2,000,000 rows" in refused(lambda: list(read_rows(path)))


def test_parquet_that_is_damaged(tmp_path):
    """Each byte of a small file changed in turn: rows, or one line."""
    path = tmp_path / "a.parquet"
    _parquet(path, {"text": ["good", "bad"]}, compression="NONE")
    whole, refusals = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :]
        )
        try:
            assert len(list(read_rows(path))) > 0
        except ValueError as error:
            assert str(error).startswith(str(path)) and len(str(error)) <= 400
            refusals += 1
    assert refusals > len(whole) // 4

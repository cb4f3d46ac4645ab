"""Memory and time of loading a checkpoint, under a limit enforced by the kernel.

    python benchmarks/load_checkpoint.py
    python benchmarks/load_checkpoint.py --gigabytes 8 --devices 1 --headroom-mb 500

Writes a sharded Llama-like checkpoint with random values to a temporary directory and
loads it in a child process. After JAX has started, the child may grow by at most the
bytes of the parameters plus `--headroom-mb` (`RLIMIT_DATA`, which counts private memory
but not files mapped read-only). A thread samples the anonymous memory of the process
during loading. `stacked` loads naively, stacking all layers of a leaf on the host
before moving it to the device; it shows that the limit is effective. Linux only. On an
accelerator the parameters are not in host memory, so the limit is tighter by their
size.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import timing
from flax.traverse_util import flatten_dict, unflatten_dict
from process_memory import PeakMemory, memory
from safetensors import safe_open

from rlhf_jax.models.config import DecoderConfig, llama_config
from rlhf_jax.models.families import config_fields, family_of, read_config
from rlhf_jax.models.hf import leaf_placement
from rlhf_jax.models.hf.hf_weights import load_pretrained
from rlhf_jax.models.hf.safetensors_files import (
    TensorToWrite,
    open_tensors,
    write_tensors,
)
from rlhf_jax.models.hf.tensor_layout import (
    leaf_pieces,
    leaf_sources,
    parameter_shapes,
    stored_tensors,
)
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.run.devices import make_mesh

# Stored as, loaded as, devices, loader.
CASES = (
    ("float32", "float32", 1, "pieces"),
    ("bfloat16", "bfloat16", 1, "pieces"),
    ("bfloat16", "float32", 1, "pieces"),
    ("bfloat16", "float32", 4, "pieces"),
    ("bfloat16", "float32", 1, "stacked"),
)


def shape_of(gigabytes: float, itemsize: int, *, smoke: bool) -> DecoderConfig:
    """A Llama with as many layers as fill the bytes, at least two."""
    width, mlp_width, vocab_size = (256, 1024, 4096) if smoke else (2560, 8192, 32_000)
    layer = width * (2 * width + 2 * width // 4 + 3 * mlp_width)
    rest = 2 * vocab_size * width
    return llama_config(
        vocab_size=vocab_size,
        max_positions=2048,
        width=width,
        num_layers=max(2, round((gigabytes * 1e9 / itemsize - rest) / layer)),
        num_heads=width // 64,
        num_kv_heads=width // 256,
        mlp_width=mlp_width,
    )


def write_checkpoint(directory: Path, config: DecoderConfig, dtype: str) -> int:
    """Random values, one tensor at a time; the bytes of all.

    Of all bits but two of the exponent: none is subnormal, NaN or infinite.
    """
    stored_as = np.dtype(getattr(ml_dtypes, dtype, dtype))
    word = np.dtype(f"u{stored_as.itemsize}")
    high, next_to_it = (word.type(1 << (8 * word.itemsize - i)) for i in (2, 3))
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        bits = rng.integers(0, np.iinfo(word).max, shape, word)
        bits &= ~high
        bits |= next_to_it
        return bits.view(stored_as)

    family = family_of(config)
    shapes = parameter_shapes(Transformer(config))
    stored = stored_tensors(family, family.prefix, shapes, config.num_layers)
    tensors = {
        name: TensorToWrite(
            shape=tensor.shape, dtype=stored_as, compute=partial(draw, tensor.shape)
        )
        for name, tensor in stored.items()
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_tensors(directory, tensors, max_shard_bytes=total // 4)
    fields = config_fields(config, "lm", stored_as)
    (directory / "config.json").write_text(json.dumps(fields))
    return total


def drop_from_cache(directory: Path) -> None:
    """Drops the file cache, so that the next read is from disk."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# The child


def load_stacked(directory: Path, dtype: Any) -> Any:
    """A leaf at a time: all of its layers on the host, then on the device."""
    config = llama_shape(directory)
    family = family_of(config)
    shapes = parameter_shapes(Transformer(config, param_dtype=dtype))
    leaves = {}
    with open_tensors(directory) as tensors:
        for name, source in leaf_sources(family, family.prefix, shapes).items():
            everything = (slice(None),) * len(source.shape)
            parts = [
                (piece.values.T if piece.is_turned else piece.values).astype(dtype)
                for piece in leaf_pieces(source, tensors, everything, 1 << 60)
            ]
            leaves[name] = jnp.array(np.stack(parts) if source.is_stacked else parts[0])
    return unflatten_dict(leaves, sep="/")


def llama_shape(directory: Path) -> DecoderConfig:
    """From `config.json`."""
    return read_config(directory)[1]


def device_bytes(params: Any) -> int:
    """Bytes of all shards, copies counted as often as there are."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
    )


def check(directory: Path, params: Any) -> None:
    """A row of three tensors, read by the library."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    layers = leaves["layers/down/kernel"].shape[0]
    weights = {
        "model.embed_tokens.weight": leaves["token_embedding"][7],
        "lm_head.weight": leaves["output_embedding"][:, 7],
        f"model.layers.{layers - 1}.mlp.down_proj.weight": leaves["layers/down/kernel"][
            -1, :, 7
        ],
    }
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in weights.keys() & set(tensors.keys()):
                want = tensors.get_slice(name)[7:8][0].astype(weights[name].dtype)
                np.testing.assert_array_equal(weights.pop(name), want)
    assert not weights


def child(arguments: argparse.Namespace) -> None:
    """Loads under the limit; prints JSON."""
    _, wanted, devices, loader = arguments.child
    dtype, directory = jnp.dtype(wanted), Path(arguments.directory)
    jax.config.update("jax_num_cpu_devices", int(devices))
    if arguments.piece_mb is not None:
        leaf_placement.PIECE_BYTES = int(arguments.piece_mb * 2**20)
    mesh = make_mesh(data=1, fsdp=int(devices)) if int(devices) > 1 else None
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # threads of the compiler
    shapes = parameter_shapes(Transformer(llama_shape(directory)))
    count = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    on_host = count * dtype.itemsize if jax.default_backend() == "cpu" else 0
    limit = memory("VmData") + on_host + int(arguments.headroom_mb * 2**20)
    before = memory("RssAnon")
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    compilations, sampler = timing.Compilations(), PeakMemory()
    sampler.start()
    load: Callable[[], Any] = partial(load_stacked, directory, dtype)
    if loader == "pieces":
        load = lambda: load_pretrained(directory, dtype=dtype, mesh=mesh)[1]  # noqa: E731
    seconds, params = timing.timed(load)
    peak = sampler.stop()
    check(directory, params)
    placed = device_bytes(params)
    timing.print_result(
        {
            "device_bytes": placed,
            "peak_above_device_bytes": peak - before - (placed if on_host else 0),
            "limit_bytes_above_device_bytes": int(arguments.headroom_mb * 2**20),
            "seconds": seconds,
            "compile_s": compilations.seconds,
            "compilations": compilations.count,
        }
    )


# The parent


def run_case(
    case: tuple[str, str, int, str], directory: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One child; what it printed, or how it ended."""
    began = time.perf_counter()
    flags = [f"--directory={directory}", f"--headroom-mb={arguments.headroom_mb}"]
    if arguments.piece_mb is not None:
        flags.append(f"--piece-mb={arguments.piece_mb}")
    command = [sys.executable, __file__, *flags, "--child", *map(str, case)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    names = ("stored_as", "loaded_as", "devices", "loader")
    row = dict(zip(names, case, strict=True))
    if done.returncode == 0:
        return row | {"error": None} | json.loads(done.stdout.splitlines()[-1])
    words = ("Error", "RESOURCE_EXHAUSTED", "bad_alloc", "out of memory")
    lines = [
        line for line in done.stderr.splitlines() if any(word in line for word in words)
    ]
    reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
    return row | {"error": reason, "seconds": time.perf_counter() - began}


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    name = f"{row['stored_as']:>8} → {row['loaded_as']:8} {row['devices']} device(s)"
    if row["error"] is not None:
        print(f"{name} {row['loader']:8} failed under the limit: {row['error']}")
        return
    print(
        f"{name} {row['loader']:8} {row['device_bytes'] / 1e6:8,.0f} MB placed, "
        f"{row['peak_above_device_bytes'] / 1e6:6,.0f} MB above, "
        f"{row['seconds']:6.1f} s ({row['compile_s']:.1f} s compiling "
        f"{row['compilations']}), {row['mb_per_s']:6,.0f} MB/s of file",
        flush=True,
    )


def main() -> None:
    """Checkpoints, children, table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the files")
    parser.add_argument("--headroom-mb", type=float, default=1024.0)
    parser.add_argument("--piece-mb", type=float, help="most on the host; default 64")
    parser.add_argument("--devices", type=int, nargs="*", help="only such cases")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--directory", help="for the checkpoints; default: temporary")
    parser.add_argument("--smoke", action="store_true", help="tens of megabytes")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    if arguments.smoke:
        arguments.gigabytes, arguments.piece_mb = 0.04, 1.0
    machine = timing.machine()
    timing.print_machine(machine)
    rows = []
    cases = [c for c in CASES if not arguments.devices or c[2] in arguments.devices]
    for stored_as in dict.fromkeys(case[0] for case in cases):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
            directory = Path(name)
            itemsize = jnp.dtype(stored_as).itemsize
            shape = shape_of(arguments.gigabytes, itemsize, smoke=arguments.smoke)
            size = write_checkpoint(directory, shape, stored_as)
            for case in (case for case in cases if case[0] == stored_as):
                if arguments.cold:
                    drop_from_cache(directory)
                row = run_case(case, directory, arguments)
                row |= {"file_bytes": size, "mb_per_s": size / 1e6 / row["seconds"]}
                rows.append(row)
                print_row(row)
    timing.print_result({"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
